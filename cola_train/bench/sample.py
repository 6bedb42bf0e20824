"""`cola-train bench sample`, in the measuring process: prompts of one length continued together, to the last token."""

import dataclasses
import functools
from typing import Any

import torch

from cola_train.bench.machine import Clock, Memory
from cola_train.bench.report import Speedometer, speed, spread, used, utilisation
from cola_train.bench.workloads import checkpoint, sampling_run
from cola_train.config.bench import BenchSampleConfig
from cola_train.config.loop import Convention
from cola_train.config.settings import UserError
from cola_train.data.progress import progress_bar
from cola_train.flops.sampling import generation_parts
from cola_train.flops.work import Work
from cola_train.hf_format import Checkpoint
from cola_train.sampling.blocks import Prefix
from cola_train.sampling.generate import generate
from cola_train.sampling.precision import computes_in_bf16
from cola_train.sampling.prompts import named_device


def measure_sample(config: BenchSampleConfig, device_name: str) -> dict[str, Any]:
    """Measure how fast a checkpoint generates, in this process.

    Returns:
        What `cola-train bench sample` reports, see docs/benchmarks.md.

    Raises:
        UserError: no such workload, checkpoint or device, or too little memory on a GPU.
    """
    device = named_device(device_name)
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model = checkpoint(config, device)
    try:
        return _measure(config, model, Clock(device, config.threads))
    except torch.OutOfMemoryError:
        raise UserError(f"The GPU has too little memory for {config.batch} prompts at a time; give a smaller batch.") from None


def _measure(config: BenchSampleConfig, model: Checkpoint, clock: Clock) -> dict[str, Any]:
    assert model.dit is not None
    vae, dit = model.vae.config, model.dit.config
    generator = torch.Generator().manual_seed(0)
    prompts: list[list[int]] = torch.randint(vae.vocab_size, (config.batch, config.prompt_tokens), generator=generator).tolist()
    sampler = dataclasses.replace(config.sampler, batch_size=config.batch)
    block_tokens = vae.patch_size * dit.block_size
    known = Prefix.of(config.prompt_tokens, vae.patch_size, dit.block_size).known_tokens
    num_blocks = -(-(known + sampler.max_new_tokens) // block_tokens)
    # Up to the first block's last token: the prefix and one block.
    first = dataclasses.replace(sampler, max_new_tokens=min(sampler.max_new_tokens, block_tokens - known))

    speedometer = Speedometer(clock)
    speedometer.read()
    memory = Memory(clock.device)
    bar = progress_bar("measuring", "batch", config.warmups + config.runs)
    whole, to_first = [], []
    for number in range(config.warmups + config.runs):
        times = [clock.time(functools.partial(generate, model, prompts, settings)) for settings in (first, sampler)]
        if number >= config.warmups:
            to_first.append(times[0])
            whole.append(times[1])
        bar.update(1)
    bar.close()
    memory_used = used(memory)
    speedometer.read()

    precision = "bf16" if computes_in_bf16(sampler, clock.device) else "fp32"
    seconds, first_block = spread(whole), spread(to_first)
    tokens = config.batch * sampler.max_new_tokens
    work = sum(generation_parts(sampling_run(vae, dit), sampler, config.prompt_tokens, config.batch).values(), Work())
    flops: dict[Convention, int] = {"model": work.model, "executed": work.executed}
    return {
        "workload": config.workload,
        "batch": config.batch,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": sampler.max_new_tokens,
        "sampler": dataclasses.asdict(sampler),
        "parameters": {"vae": _count(model.vae), "dit": _count(model.dit)},
        "precision": precision,
        "machine": speedometer.report(),
        "seconds": seconds,
        **speed(tokens, seconds["median"], speedometer, precision),
        "first_block_seconds": first_block,
        "blocks": num_blocks,
        "block_seconds": (seconds["median"] - first_block["median"]) / (num_blocks - 1) if num_blocks > 1 else None,
        **utilisation(flops, seconds["median"], clock, speedometer, precision),
        "memory": memory_used,
    }


def _count(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())

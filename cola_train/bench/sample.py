"""`cola-train bench sample`, in the measuring process: prompts of one length continued together."""

import dataclasses
from typing import Any

import torch

from cola_train.bench.config import BenchSampleConfig, MemoryTooSmallError
from cola_train.bench.machine import Clock, Memory, Speedometer, spread
from cola_train.bench.workloads import checkpoint
from cola_train.config.loop import Convention
from cola_train.console import progress_bar
from cola_train.devices import named_device
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate
from cola_train.flops.work import Work
from cola_train.sampling.precision import computes_in_bf16


def measure_sample(config: BenchSampleConfig, device_name: str) -> dict[str, Any]:
    """Measure, in this process, what `cola-train bench sample` reports, see docs/benchmarks.md.

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
        raise MemoryTooSmallError(
            f"The GPU has too little memory for {config.batch} prompts at a time; give a smaller "
            "batch."
        ) from None


def _measure(config: BenchSampleConfig, model: Checkpoint, clock: Clock) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch, config.prompt_tokens)
    prompts: list[list[int]] = torch.randint(model.vocab_size, shape, generator=generator).tolist()
    sampler = dataclasses.replace(config.sampler, batch_size=config.batch)
    first_tokens, pass_tokens = model.tokens_a_pass(config.prompt_tokens, sampler.max_new_tokens)
    num_passes = 1 + max(0, -(-(sampler.max_new_tokens - first_tokens) // pass_tokens))
    # Up to the first pass's last token: the prefix and one block.
    first = dataclasses.replace(sampler, max_new_tokens=min(sampler.max_new_tokens, first_tokens))

    speedometer = Speedometer(clock)
    speedometer.read()
    memory = Memory(clock.device)
    to_first, whole = [], []
    num_runs = config.warmups + config.runs
    with progress_bar("measuring", "batch", num_runs) as bar:
        for _ in range(num_runs):
            to_first.append(clock.time(lambda: generate(model, prompts, first)))
            whole.append(clock.time(lambda: generate(model, prompts, sampler)))
            bar.update(1)
    memory_used = memory.used()
    speedometer.read()

    precision = "bf16" if computes_in_bf16(sampler, clock.device) else "fp32"
    seconds, first_block = spread(whole[config.warmups :]), spread(to_first[config.warmups :])
    later_blocks = seconds["median"] - first_block["median"]
    tokens = config.batch * sampler.max_new_tokens
    work = sum(model.generation_work(sampler, config.prompt_tokens, config.batch).values(), Work())
    flops: dict[Convention, int] = {"model": work.model, "executed": work.executed}
    return {
        "workload": config.workload,
        "batch": config.batch,
        "prompt_tokens": config.prompt_tokens,
        "new_tokens": sampler.max_new_tokens,
        "sampler": dataclasses.asdict(sampler),
        "parameters": {
            name: sum(parameter.numel() for parameter in network.parameters())
            for name, network in model.networks.items()
        },
        "precision": precision,
        "machine": speedometer.report(),
        "seconds": seconds,
        **speedometer.rates(tokens, flops, seconds["median"], precision),
        "first_block_seconds": first_block,
        "blocks": num_passes,
        "block_seconds": later_blocks / (num_passes - 1) if num_passes > 1 else None,
        "memory": memory_used,
    }

"""What is measured: run configs by name, and checkpoints with random weights to sample from."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cola_train.config.bench import BenchSampleConfig, BenchTrainConfig
from cola_train.config.load import load_config
from cola_train.config.models import DiTConfig, TextVAEConfig
from cola_train.config.runs import JointRunConfig, RunConfig, VAERunConfig, load_run_config
from cola_train.config.settings import nearest, require
from cola_train.data.datamodule import Batch
from cola_train.data.tokenizer import TRAINED_SPECIAL_TOKENS, Tokenizer
from cola_train.hf_format import Checkpoint
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE

# What a run must say, and nothing here reads.
_NAMES = ("name=bench", "data.path=none")
# Small enough for one thread of a CPU: DiT alone trains, on latents of a frozen VAE.
_FROZEN_VAE = ("init_vae_from=random", "objective.vae_strategy.mode=fix", "trainer.precision=fp32", "vae.block_size=1",
               "dit.block_size=16")  # fmt: skip
_S = (
    "vae.vocab_size=1024", "vae.dim=128", "vae.ffn_dim=512", "vae.num_heads=4", "vae.encoder_num_blocks=2",
    "vae.decoder_num_blocks=2", "dit.num_layers=4", "dit.txt_dim=128", "dit.emb_dim=128", "dit.heads=4", "dit.head_dim=32",
    "dit.rope_dim=24",
)  # fmt: skip
_M = (
    "vae.vocab_size=4096", "vae.dim=256", "vae.ffn_dim=1024", "vae.num_heads=4", "vae.encoder_num_blocks=4",
    "vae.decoder_num_blocks=4", "dit.num_layers=8", "dit.txt_dim=384", "dit.emb_dim=384", "dit.heads=6", "dit.head_dim=64",
    "dit.rope_dim=48",
)  # fmt: skip


def _batch(rows: int, seq_len: int) -> tuple[str, ...]:
    return (f"trainer.micro_batch_size={rows}", f"trainer.global_batch_size={rows}", f"data.seq_len={seq_len}")


# The stage, and what differs from the defaults of its config, which are the paper's.
WORKLOADS: dict[str, tuple[type[RunConfig], tuple[str, ...]]] = {
    "S": (JointRunConfig, (*_FROZEN_VAE, *_S, *_batch(8, 256))),
    "M": (JointRunConfig, (*_FROZEN_VAE, *_M, *_batch(2, 512))),
    "paper_stage1": (VAERunConfig, ("vae.block_size=1", *_batch(8, 512))),
    "paper_stage2": (
        JointRunConfig,
        ("init_vae_from=random", "vae.block_size=1", "dit.block_size=16", "budget.nominal_parameters=1800000000", *_batch(8, 512)),
    ),
}
SAMPLED = {"S": "S", "M": "M", "paper": "paper_stage2"}


def run_config(config: BenchTrainConfig, of_run: Sequence[str] = ()) -> RunConfig:
    """The run whose step is measured: its global batch is that of one process, `rows` x `micro_batches` of `seq_len` tokens.

    Args:
        config: names a workload, or a run's config file.
        of_run: settings of the run, as key=value, over the workload's.

    Raises:
        UserError: no such workload or file; whatever the run's config refuses.
    """
    name = config.workload
    if name.endswith((".yaml", ".yml")):
        run: RunConfig = load_run_config(Path(name), of_run)
    else:
        require(name in WORKLOADS, f"There is no workload {name!r} (or give a run's .yaml file): {nearest(name, WORKLOADS)}")
        stage, settings = WORKLOADS[name]
        run = load_config(stage, None, [*_NAMES, *settings, *of_run])
    trainer, parallel = run.trainer, run.parallel
    rows = config.rows or trainer.micro_batch_size
    micro_batches = config.micro_batches or trainer.global_batch_size // (trainer.micro_batch_size * parallel.num_processes)
    return dataclasses.replace(
        run,
        trainer=dataclasses.replace(trainer, micro_batch_size=rows, global_batch_size=rows * micro_batches),
        data=dataclasses.replace(run.data, seq_len=config.seq_len or run.data.seq_len),
        parallel=dataclasses.replace(parallel, num_processes=1),
    )


def random_batch(config: RunConfig) -> Batch:
    """A step's rows of random tokens: no padding, one document a row."""
    rows, seq_len = config.trainer.global_batch_size, config.data.seq_len
    tokens = torch.randint(config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0))
    index = torch.arange(rows)
    return Batch(tokens, torch.ones(rows, seq_len, dtype=torch.bool), torch.zeros_like(tokens), index, index.clone())


def randomise(network: nn.Module) -> None:
    """Give every tensor of the network, or of its part on this process, random values in place; none is left idle at zero.

    Values of the size that keeps activations near 1. With adaLN-Zero's zeros gradients would be denormal numbers for many steps,
    which a CPU computes slowly.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            local: Tensor = getattr(parameter, "_local_tensor", parameter)
            if parameter.ndim == 1:
                local.fill_(1.0 if name.endswith(".weight") else 0.0)
            else:
                local.normal_(std=parameter[0].numel() ** -0.5)


def checkpoint(config: BenchSampleConfig, device: torch.device) -> Checkpoint:
    """What generates: a workload's networks with random weights, or a checkpoint from a folder.

    Raises:
        UserError: neither; or a checkpoint without a DiT.
    """
    name = config.workload
    if name not in SAMPLED:
        require(Path(name).is_dir(), f"There is no workload {name!r} (or give a checkpoint folder): {nearest(name, SAMPLED)}")
        loaded = Checkpoint.load(name, device)
        require(loaded.dit is not None, f"{name} holds a VAE only; sampling needs the DiT of stage 2 (cola-train joint).")
        return loaded
    _, settings = WORKLOADS[SAMPLED[name]]
    run = load_config(JointRunConfig, None, [*_NAMES, *settings])
    with torch.device(device):
        vae, dit = TextVAE(run.vae), BlockCausalDiT(run.dit)
    for network in (vae, dit):
        randomise(network)
        network.eval().requires_grad_(False)
    return Checkpoint(vae, dit, _word_tokenizer(run.vae.vocab_size))


def sampling_run(vae: TextVAEConfig, dit: DiTConfig) -> JointRunConfig:
    """A run of these networks, for the ledger of FLOPs."""
    return dataclasses.replace(load_config(JointRunConfig, None, [*_NAMES, "objective.reference_weight=0"]), vae=vae, dit=dit)


def _word_tokenizer(vocab_size: int) -> Tokenizer:
    """An id a word."""
    words = [*TRAINED_SPECIAL_TOKENS, *(f"w{number}" for number in range(len(TRAINED_SPECIAL_TOKENS), vocab_size))]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": token, **special} for number, token in enumerate(TRAINED_SPECIAL_TOKENS)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: number for number, word in enumerate(words)}, "unk_token": words[-1]},
    }
    return Tokenizer(json.dumps(content).encode())

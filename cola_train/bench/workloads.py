"""What is measured: run configs by name, and checkpoints with random weights to sample from."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cola_train.bench.config import BenchSampleConfig, BenchTrainConfig
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.settings import nearest, require
from cola_train.data.batch import Batch
from cola_train.data.tokenizer import TRAINED_SPECIAL_TOKENS, Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.family import TrainedRun
from cola_train.families.registry import families, family_named, load_checkpoint, load_run_config

# What a run must say, and nothing here reads.
_NAMES = ("name=bench", "data.path=none")


def workloads() -> dict[str, tuple[type[RunConfig], tuple[str, ...]]]:
    """By name, the config's class and what differs from its defaults, which are the paper's."""
    return {
        name: (family.config, settings)
        for family in families().values()
        for name, settings in family.workloads.items()
    }


def run_config(config: BenchTrainConfig, of_run: Sequence[str] = ()) -> RunConfig:
    """The run whose step is measured: its global batch is that of one process, `rows` x
    `micro_batches` of `seq_len` tokens.

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
        known = workloads()
        require(
            name in known,
            f"There is no workload {name!r} (or give a run's .yaml file): {nearest(name, known)}",
        )
        config_class, settings = known[name]
        run = load_config(config_class, None, [*_NAMES, *settings, *of_run])
    trainer, parallel = run.trainer, run.parallel
    rows = config.rows or trainer.micro_batch_size
    micro_batches = config.micro_batches or trainer.global_batch_size // (
        trainer.micro_batch_size * parallel.num_processes
    )
    return dataclasses.replace(
        run,
        trainer=dataclasses.replace(
            trainer, micro_batch_size=rows, global_batch_size=rows * micro_batches
        ),
        data=dataclasses.replace(run.data, seq_len=config.seq_len or run.data.seq_len),
        parallel=dataclasses.replace(parallel, num_processes=1),
    )


def random_batch(config: RunConfig) -> Batch:
    """A step's rows of random tokens: no padding, one document a row."""
    rows, seq_len = config.trainer.global_batch_size, config.data.seq_len
    tokens = torch.randint(
        config.vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(0)
    )
    index = torch.arange(rows)
    return Batch(
        tokens,
        torch.ones(rows, seq_len, dtype=torch.bool),
        torch.zeros_like(tokens),
        index,
        index.clone(),
    )


def randomize(network: nn.Module) -> None:
    """Give every tensor of the network, or of its part on this process, random values in place;
    none is left idle at zero.

    Values of the size that keeps activations near 1. With adaLN-Zero's zeros gradients would be
    denormal numbers for many steps, which a CPU computes slowly.
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
        UserError: neither; or a checkpoint that writes no text.
    """
    name = config.workload
    of_families = {
        known: family for family in families().values() for known in family.generation_workloads
    }
    if name not in of_families:
        require(
            Path(name).is_dir(),
            f"There is no workload {name!r} (or give a checkpoint folder): "
            f"{nearest(name, of_families)}",
        )
        loaded = load_checkpoint(name, device)
        require(
            family_named(loaded.family).writes_text,
            f"{name} is a checkpoint of `cola-train {loaded.family}`, which writes no text; give "
            "one of stage 2 (cola-train joint) or of a baseline.",
        )
        return loaded
    family = of_families[name]
    run = load_config(
        family.config, None, [*_NAMES, *family.workloads[family.generation_workloads[name]]]
    )
    with torch.device(device):
        objective = family.build(run)
    randomize(objective)
    tokenizer = _word_tokenizer(run.vocab_size)
    return family.checkpoint(TrainedRun(run, objective.state_dict(), tokenizer, {}), device)


def _word_tokenizer(vocab_size: int) -> Tokenizer:
    """An id a word."""
    words = [
        *TRAINED_SPECIAL_TOKENS,
        *(f"w{number}" for number in range(len(TRAINED_SPECIAL_TOKENS), vocab_size)),
    ]
    special = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": token, **special}
            for number, token in enumerate(TRAINED_SPECIAL_TOKENS)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": words[-1],
        },
    }
    return Tokenizer(json.dumps(content).encode())

"""What is measured: run configs by name, and checkpoints with random weights to sample from."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, pre_tokenizers
from torch import nn

from cola_train.bench.config import BenchSampleConfig, BenchTrainConfig
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.settings import nearest, require
from cola_train.data.batch import Batch
from cola_train.data.tokenizer import TRAINED_SPECIAL_TOKENS, Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.family import Family, TrainedRun
from cola_train.families.registry import families, family_named, load_checkpoint, load_run_config
from cola_train.models.blocks import reset_buffers
from cola_train.processes import local_part

# Settings without a default, which nothing here reads.
_NAMES = ("name=bench", "data.path=none")


def workloads() -> dict[str, tuple[type[RunConfig], tuple[str, ...]]]:
    """By name, the config's class and the settings over its defaults, which are the paper's."""
    return {
        name: (family.config, settings)
        for family in families().values()
        for name, settings in family.workloads.items()
    }


def run_config(config: BenchTrainConfig, of_run: Sequence[str] = ()) -> RunConfig:
    """The run whose step is measured: one process, `rows` x `micro_batches` of `seq_len` tokens.

    `of_run` are settings of the run, as key=value, over the workload's or its config file's.

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
    rows_at_once = trainer.micro_batch_size * parallel.num_processes
    micro_batches = config.micro_batches or trainer.global_batch_size // rows_at_once
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
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (rows, seq_len), generator=generator)
    real, index = torch.ones(rows, seq_len, dtype=torch.bool), torch.arange(rows)
    return Batch(tokens, real, torch.zeros_like(tokens), index, index.clone())


def randomize(network: nn.Module) -> None:
    """Give a network's parameters, or their local shards, random values in place.

    Values of the size that keeps activations near 1. With adaLN-Zero's zeros gradients would be
    denormal numbers for many steps, which a CPU computes slowly.
    """
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            local = local_part(parameter)
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
    known = {name: family for family in families().values() for name in family.generation_workloads}
    if name not in known:
        require(
            Path(name).is_dir(),
            f"There is no workload {name!r} (or give a checkpoint folder): {nearest(name, known)}",
        )
        loaded = load_checkpoint(name, device)
        require(
            family_named(loaded.family).writes_text,
            f"{name} is a checkpoint of `cola-train {loaded.family}`, which writes no text; give "
            "one of stage 2 (cola-train joint) or of a baseline.",
        )
        return loaded
    return _random_checkpoint(known[name], known[name].generation_workloads[name], device)


def _random_checkpoint(family: Family[Any], workload: str, device: torch.device) -> Checkpoint:
    run = load_config(family.config, None, [*_NAMES, *family.workloads[workload]])
    with torch.device("meta"):
        meta = family.build(run).state_dict()
    # Zeros that take no memory: the networks are filled in place, so that they are held only once.
    weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in meta.items()}
    trained = TrainedRun(run, weights, _word_tokenizer(run.vocab_size), {})
    with torch.device(device):
        made = family.checkpoint(trained, device)
    for network in made.networks.values():
        randomize(network)
        reset_buffers(network)
    return made


def _word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with one id for each word "w7", "w8", ... after the special tokens."""
    num_special = len(TRAINED_SPECIAL_TOKENS)
    words = [*TRAINED_SPECIAL_TOKENS, *(f"w{number}" for number in range(num_special, vocab_size))]
    ids = {word: number for number, word in enumerate(words)}
    library = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=words[-1]))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(list(TRAINED_SPECIAL_TOKENS))
    return Tokenizer(library.to_str().encode())

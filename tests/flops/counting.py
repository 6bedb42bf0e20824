"""Small run configs, one real optimizer step of each, and torch's own count of its FLOPs."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.data.batch import Batch
from cola_train.families.autoregressive.family import AutoregressiveRunConfig
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.masked_diffusion.family import LLaDARunConfig
from cola_train.families.registry import family_of
from cola_train.flops.work import Parts, Work
from cola_train.objectives.objective import Objective, total_loss
from cola_train.training.parallel.blocks import checkpoint_activations
from tests.helpers.runs import SMALL, SMALL_DIT
from tests.helpers.tiny import make_batch, random_tokens, rows_of

_COMMON = [setting for setting in SMALL if not setting.startswith("vae.")]
SMALL_TRANSFORMER = [
    "transformer.vocab_size=320",
    "transformer.hidden_size=24",
    "transformer.intermediate_size=40",
    "transformer.num_hidden_layers=2",
    "transformer.num_attention_heads=2",
    "transformer.head_dim=16",
]


def changed(config: Any, values: Mapping[str, Any]) -> Any:
    """A config with other values by dotted key, checked as when it is loaded."""
    own: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, dot, rest = key.partition(".")
        if dot:
            nested.setdefault(section, {})[rest] = value
        else:
            own[section] = value
    sections = {
        section: changed(getattr(config, section), inner) for section, inner in nested.items()
    }
    return dataclasses.replace(config, **own, **sections)


@functools.cache
def run_config(stage: str, *overrides: str) -> Any:
    """A small config of a stage; stage 2 starts from a VAE unless overridden."""
    places = ["name=small", "data.path=nowhere"]
    if stage == "vae":
        return load_config(VAERunConfig, None, [*SMALL, *places, *overrides])
    if stage == "joint":
        return load_config(
            JointRunConfig, None, [*SMALL, *SMALL_DIT, *places, "init_vae_from=stage1", *overrides]
        )
    kind = AutoregressiveRunConfig if stage == "ar" else LLaDARunConfig
    return load_config(kind, None, [*_COMMON, *SMALL_TRANSFORMER, *places, *overrides])


def build_objective(config: RunConfig) -> Objective:
    """The stage's objective with whatever weights torch gives it."""
    return family_of(config).build(config)


def training_batch(config: RunConfig) -> Batch:
    """A step's rows: two documents each, of whole blocks, and padding at the end of the first."""
    rows, seq = config.trainer.global_batch_size, config.data.seq_len
    tokens = random_tokens(rows, seq, seed=5, vocab_size=config.vocab_size)
    documents = (torch.arange(seq) >= seq // 2).long().expand(rows, -1)
    return make_batch(tokens, [3] + [0] * (rows - 1), documents)


def counter() -> FlopCounterMode:
    """Torch's counter, with its formulas for the fused attention kernels put on the CPU's, which it
    does not know.
    """
    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        },
    )


def _attention(
    query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def count_step(config: Any, step: int = 0) -> FlopCounterMode:
    """Run optimizer step `step`, all micro-batches forward and backward, under torch's counter."""
    objective, batch = build_objective(config), training_batch(config)
    checkpoint_activations(objective, config.parallel.activation_checkpointing)
    counts = objective.counts(batch)
    size = config.trainer.micro_batch_size
    with counter() as counted:
        for start in range(0, len(batch.tokens), size):
            micro_batch = rows_of(batch, slice(start, start + size))
            total_loss(objective(micro_batch, step), counts).backward()
    return counted


def total(parts: Parts, prefix: str = "") -> Work:
    """The work of the parts whose names begin so, added up."""
    return sum(
        (work for name, work in parts.items() if f"{name}.".startswith(prefix and f"{prefix}.")),
        Work(),
    )

"""Where a new run's weights come from: drawn, or another checkpoint's VAE or DiT."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.config import ColaRunConfig, JointRunConfig
from cola_train.families.cola.format import DIT_FORMAT, VAE_FORMAT, find_root
from cola_train.models.initialize import dit_value, text_vae_value

Shapes = Mapping[str, torch.Size]


def vae_values(
    config: ColaRunConfig, source: str | None, shapes: Shapes
) -> Iterator[tuple[str, Tensor]]:
    """The VAE of checkpoint `source`, or drawn; with a copy where `shapes` has a reference encoder.

    `shapes` are those of the objective's parameters, by name.
    """
    if source is not None:
        values = VAE_FORMAT.tensors(source, config.vae)
    else:
        values = (
            (name, text_vae_value(name, shape, config.vae, config.seed))
            for name, shape in _below("vae.", shapes)
        )
    for name, value in values:
        yield f"vae.{name}", value
        if f"reference_{name}" in shapes:
            yield f"reference_{name}", value


def dit_values(config: JointRunConfig, shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
    """The DiT; drawn unless init_dit_from names a checkpoint."""
    if config.init_dit_from is not None:
        values = DIT_FORMAT.tensors(config.init_dit_from, config.dit)
    else:
        values = (
            (name, dit_value(name, shape, config.seed)) for name, shape in _below("dit.", shapes)
        )
    for name, value in values:
        yield f"dit.{name}", value


def check_start(config: JointRunConfig, data: PreparedData) -> None:
    """Refuse checkpoints to start from whose networks or tokenizer are others than the run's.

    Raises:
        UserError: these, or no checkpoint.
    """
    for folder in (config.init_vae_from, config.init_dit_from):
        if folder is not None:
            theirs = Tokenizer.load(find_root(folder) / "tokenizer.json")
            data.check_run(config.data, theirs.sha256)
    if config.init_vae_from is not None:
        VAE_FORMAT.check_fits(config.init_vae_from, config.vae)
    if config.init_dit_from is not None:
        DIT_FORMAT.check_fits(config.init_dit_from, config.dit)


def _below(prefix: str, shapes: Shapes) -> Iterator[tuple[str, torch.Size]]:
    for name, shape in shapes.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), shape

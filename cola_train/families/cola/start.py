"""What new runs start from: values that are drawn, measured, or read from checkpoints."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cola_train.config.settings import UserError, require
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.config import ColaRunConfig, DistillRunConfig, Stage2RunConfig
from cola_train.families.cola.format import (
    DIT_FORMAT,
    VAE_FORMAT,
    ConfigT,
    dit_format,
    dit_format_in,
    find_root,
)
from cola_train.families.cola.yardsticks.reading import read_statistics
from cola_train.models.config import DiTConfig
from cola_train.models.initialize import dit_value, text_vae_value
from cola_train.models.text_vae import TextVAE

_MEASURED_AT_ONCE = 64  # rows


def vae_values(
    config: ColaRunConfig, source: str | None, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The VAE of checkpoint `source`, or drawn; with a copy where `shapes` has a reference encoder.

    `shapes` are those of the objective's parameters, by name.
    """
    draw = functools.partial(text_vae_value, config=config.vae, seed=config.seed)
    for name, value in VAE_FORMAT.first_values(source, config.vae, shapes, draw):
        yield f"vae.{name}", value
        if f"reference_{name}" in shapes:
            yield f"reference_{name}", value


def dit_values(
    config: Stage2RunConfig, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """The DiT; drawn unless init_dit_from names a checkpoint. A codebook is measured anyway."""
    draw = functools.partial(dit_value, seed=config.seed)
    stored = dit_format(config.dit)
    for name, value in stored.first_values(config.init_dit_from, config.dit, shapes, draw):
        yield f"dit.{name}", value
    if config.dit.head == "codebook":
        assert config.init_vae_from is not None
        vae = VAE_FORMAT.load(find_root(config.init_vae_from)).eval()
        yield from _codebook_values(config, vae)


def _codebook_values(config: Stage2RunConfig, vae: TextVAE) -> Iterator[tuple[str, Tensor]]:
    data = PreparedData.open(config.data.path)
    with torch.no_grad():
        found = read_statistics(
            vae, data, None, _MEASURED_AT_ONCE, config.masks_documents, config.fixed_log_snr
        )
    for field in dataclasses.fields(found.codebook):
        yield f"dit.codebook.{field.name}", getattr(found.codebook, field.name)


def teacher_config(config: DistillRunConfig) -> DiTConfig:
    """The config of the DiT that teaches.

    Raises:
        UserError: there is no checkpoint with a DiT.
    """
    root = _teacher(config)
    return (dit_format_in(root) or DIT_FORMAT).read_config(root)


def teacher_values(config: DistillRunConfig) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the DiT that teaches."""
    root, taught_by = _teacher(config), teacher_config(config)
    for name, value in dit_format(taught_by).tensors(root, taught_by):
        yield f"teacher.{name}", value


def _teacher(config: DistillRunConfig) -> Path:
    try:
        root = find_root(config.teacher_from)
        (dit_format_in(root) or DIT_FORMAT).folder(root)
    except UserError as error:
        raise UserError(f"teacher_from={config.teacher_from}: {error}") from None
    return root


def check_teacher(config: DistillRunConfig, data: PreparedData) -> None:
    """Refuse a teacher whose VAE, tokenizer or blocks are others than the run's."""
    _refuse_other(
        "teacher_from", config.teacher_from, config, data, VAE_FORMAT.check_fits, config.vae
    )
    size = teacher_config(config).block_size
    require(
        size == config.dit.block_size,
        f"teacher_from={config.teacher_from} has blocks of {size} latents, and dit.block_size is "
        f"{config.dit.block_size}: both must see the same history. Set dit.block_size={size}.",
    )


def check_start(config: Stage2RunConfig, data: PreparedData) -> None:
    """Refuse checkpoints to start from whose networks or tokenizer are others than the run's.

    Raises:
        UserError: these, or no checkpoint, with the setting that names it.
    """
    if config.init_vae_from is not None:
        _refuse_other(
            "init_vae_from", config.init_vae_from, config, data, VAE_FORMAT.check_fits, config.vae
        )
    if config.init_dit_from is not None:
        fits = dit_format(config.dit).check_fits
        _refuse_other("init_dit_from", config.init_dit_from, config, data, fits, config.dit)


def _refuse_other(
    key: str,
    folder: str,
    config: Stage2RunConfig,
    data: PreparedData,
    check_fits: Callable[[str, ConfigT], None],
    network: ConfigT,
) -> None:
    try:
        theirs = Tokenizer.load(find_root(folder) / "tokenizer.json")
        data.check_run(config.data, theirs.sha256)
        check_fits(folder, network)
    except UserError as error:
        raise UserError(f"{key}={folder}: {error}") from None

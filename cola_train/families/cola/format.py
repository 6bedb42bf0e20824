"""The released checkpoint layout, both ways: <root>/cola_dlm/{cola_vae,cola_dit}/ and
<root>/tokenizer.json.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import atomic_folder
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.run_layout import EXPORT
from cola_train.tensor_files import (
    DEFAULT_MAX_SHARD_BYTES,
    TRAINING,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

VAE_FOLDER, DIT_FOLDER = "cola_vae", "cola_dit"


def find_root(folder: str | Path) -> Path:
    """The folder that holds `cola_dlm`: the given one, or its `hf` (a run folder)."""
    folder = Path(folder)
    for root in (folder, folder / EXPORT):
        if (root / "cola_dlm" / VAE_FOLDER).is_dir():
            return root
    what = "has no" if folder.is_dir() else "does not exist, so it has no"
    raise UserError(
        f"{folder} {what} cola_dlm/{VAE_FOLDER} (nor hf/cola_dlm/{VAE_FOLDER}): give a checkpoint "
        "in the released layout, or a run folder that has been exported (cola-train export RUN)."
    )


def read_vae_config(root: Path) -> TextVAEConfig:
    """The VAE's config.json under `root`."""
    return TextVAEConfig.from_json(*read_json(network_folder(root, VAE_FOLDER) / "config.json"))


def read_dit_config(root: Path) -> DiTConfig:
    """The DiT's config.json under `root`."""
    return DiTConfig.from_json(*read_json(network_folder(root, DIT_FOLDER) / "config.json"))


def check_vae_fits(folder: str | Path, config: TextVAEConfig) -> None:
    """Refuse a checkpoint whose VAE has another configuration than `config`."""
    root = find_root(folder)
    _same_config(read_vae_config(root), config, root, "vae")


def check_dit_fits(folder: str | Path, config: DiTConfig) -> None:
    """Refuse a checkpoint whose DiT is absent or has another configuration than `config`."""
    root = find_root(folder)
    _same_config(read_dit_config(root), config, root, "dit")


def vae_tensors(folder: str | Path, config: TextVAEConfig) -> Iterator[tuple[str, Tensor]]:
    """The VAE's tensors by name, one at a time, refusing a checkpoint of another configuration than
    `config`.
    """
    check_vae_fits(folder, config)
    return read_tensors(_shapes(TextVAE, config), network_folder(find_root(folder), VAE_FOLDER))


def dit_tensors(folder: str | Path, config: DiTConfig) -> Iterator[tuple[str, Tensor]]:
    """The DiT's tensors by name, one at a time, refusing a checkpoint of another configuration than
    `config`.
    """
    check_dit_fits(folder, config)
    return read_tensors(
        _shapes(BlockCausalDiT, config), network_folder(find_root(folder), DIT_FOLDER)
    )


def write_checkpoint(
    folder: Path,
    vae: tuple[TextVAEConfig, Mapping[str, Tensor]],
    dit: tuple[DiTConfig, Mapping[str, Tensor]] | None,
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    *,
    replace: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write configs and state dicts in the released layout, fp32, atomically: the folder is old,
    new or absent, never half.

    Of a state dict one file's tensors are asked for at a time, at most max_shard_bytes of them (or
    a single larger one).
    `training` (stage, step, seq_len) goes to a file of its own, which the released code does not
    read. Warns where the VAE scales its latents.
    """
    scale, shift = vae[0].scaling_factor, vae[0].shifting_factor
    if (scale, shift) != (1.0, 0.0):
        warnings.warn(
            f"The VAE has scaling_factor {scale} and shifting_factor {shift}. The released sampler "
            "does not undo them before it decodes, so it will generate wrong text from this "
            "checkpoint; only 1 and 0 give the same there as here.",
            stacklevel=2,
        )
    with atomic_folder(folder, replace=replace) as working:
        _write_network(
            working, VAE_FOLDER, "ColaTextVAEModel", "cola_text_vae", vae, max_shard_bytes
        )
        if dit is not None:
            _write_network(working, DIT_FOLDER, "ColaDiTModel", "cola_dit", dit, max_shard_bytes)
        tokenizer.save(working / "tokenizer.json")
        if training:
            write_json(working / TRAINING, training)


def _write_network(
    root: Path,
    name: str,
    architecture: str,
    model_type: str,
    network: tuple[Any, Mapping[str, Tensor]],
    max_shard_bytes: int,
) -> None:
    config, state = network
    folder = root / "cola_dlm" / name
    folder.mkdir(parents=True)
    fields = {**config.to_json(), "architectures": [architecture], "model_type": model_type}
    write_json(folder / "config.json", {**fields, "dtype": "float32", "torch_dtype": "float32"})
    network_class = TextVAE if name == VAE_FOLDER else BlockCausalDiT
    write_tensors(folder, _shapes(network_class, config), state, max_shard_bytes)


def network_folder(root: Path, name: str) -> Path:
    """The folder of the VAE or the DiT of a released checkpoint; UserError where it has none."""
    folder = root / "cola_dlm" / name
    if not folder.is_dir():
        raise UserError(
            f"{root} has no cola_dlm/{name}; a checkpoint of stage 1 holds the VAE only, stage 2 "
            "adds the DiT."
        )
    return folder


def _same_config(
    given: TextVAEConfig | DiTConfig, wanted: TextVAEConfig | DiTConfig, root: Path, section: str
) -> None:
    theirs, ours = given.to_json(), wanted.to_json()
    # How weights were once drawn says nothing about the network.
    differing = [
        name for name in ours if ours[name] != theirs[name] and not name.startswith("init_")
    ]
    if differing:
        listed = ", ".join(
            f"{section}.{name}: checkpoint {theirs[name]!r}, config {ours[name]!r}"
            for name in differing
        )
        raise UserError(
            f"The checkpoint {root} does not fit this run's config ({listed}). Set the config's "
            "values to the checkpoint's."
        )


def _shapes(
    network: type[nn.Module], config: TextVAEConfig | DiTConfig
) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in network(config).state_dict().items()}

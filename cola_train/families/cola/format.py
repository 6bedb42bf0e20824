"""The released checkpoint layout, read and written.

<root>/cola_dlm/{cola_vae,cola_dit}/ and <root>/tokenizer.json. A DiT with a codebook, which the
released code does not know, is in cola_codebook_dit/ instead, where that code does not look.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from cola_train.config.settings import UserError
from cola_train.data.special_tokens import NAMES_FILE
from cola_train.data.tokenizer import Tokenizer
from cola_train.export_files import (
    CONFIG_JSON,
    TRAINING,
    add_checksums,
    read_json,
    write_json,
)
from cola_train.families.cola.config import ColaRunConfig
from cola_train.files import atomic_folder
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.network_config import NetworkConfig
from cola_train.models.text_vae import TextVAE
from cola_train.run_layout import EXPORT
from cola_train.tensor_files import (
    Below,
    absence,
    load_network,
    pickle_hint,
    read_tensors,
    shapes_of,
    write_tensors,
)

NetworkT = TypeVar("NetworkT", bound=nn.Module)
ConfigT = TypeVar("ConfigT", bound=NetworkConfig)


@dataclasses.dataclass(frozen=True)
class NetworkFormat(Generic[NetworkT, ConfigT]):
    """How one network of a checkpoint is stored."""

    name: str  # the network's section of a run's config
    config: type[ConfigT]
    network: Callable[[ConfigT], NetworkT]
    folder_name: str
    architecture: str
    model_type: str
    # settings that no weight depends on, so that a run may start from a checkpoint with others
    free_settings: frozenset[str] = frozenset()

    def is_in(self, root: Path) -> bool:
        return (root / "cola_dlm" / self.folder_name).is_dir()

    def folder(self, root: Path) -> Path:
        """The network's folder in a checkpoint; UserError where it has none."""
        if not self.is_in(root):
            raise UserError(
                f"{root} has no cola_dlm/{self.folder_name}; a checkpoint of stage 1 holds the VAE "
                "only, stage 2 adds the DiT."
            )
        return root / "cola_dlm" / self.folder_name

    def read_config(self, root: Path) -> ConfigT:
        return self.config.from_json(*read_json(self.folder(root) / CONFIG_JSON))

    def load(self, root: Path) -> NetworkT:
        """The network with its weights."""
        config = self.read_config(root)
        build = functools.partial(self.network, config)
        return load_network(build, config.num_blocks, self.folder(root))

    def check_fits(self, folder: str | Path, config: ConfigT) -> None:
        """Refuse a checkpoint whose network is absent or configured otherwise than `config`."""
        root = find_root(folder)
        theirs, ours = self.read_config(root).to_json(), config.to_json()
        # How weights were once drawn says nothing about the network.
        differing = [
            f"{self.name}.{name}: checkpoint {theirs[name]!r}, config {ours[name]!r}"
            for name in ours
            if ours[name] != theirs[name]
            and not name.startswith("init_")
            and name not in self.free_settings
        ]
        if differing:
            raise UserError(
                f"The checkpoint {root} does not fit this run's config ({', '.join(differing)}). "
                "Set the config's values to the checkpoint's."
            )

    def tensors(self, folder: str | Path, config: ConfigT) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors by name, one at a time; refuses what `check_fits` refuses."""
        self.check_fits(folder, config)
        held = self.folder(find_root(folder))
        return read_tensors(self._shapes(config, held), held)

    def first_values(
        self,
        source: str | None,
        config: ConfigT,
        shapes: Mapping[str, torch.Size],
        draw: Callable[[str, torch.Size], Tensor],
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of checkpoint `source`, or drawn, of an objective's parameters' `shapes`."""
        if source is not None:
            return self.tensors(source, config)
        prefix = f"{self.name}."
        own = (name.removeprefix(prefix) for name in shapes if name.startswith(prefix))
        return ((name, draw(name, shapes[prefix + name])) for name in own)

    def write(
        self, root: Path, config: ConfigT, state: Mapping[str, Tensor], max_shard_bytes: int
    ) -> None:
        folder = root / "cola_dlm" / self.folder_name
        folder.mkdir(parents=True)
        fields = {
            **config.to_json(),
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "dtype": "float32",
            "torch_dtype": "float32",
        }
        write_json(folder / CONFIG_JSON, fields)
        write_tensors(folder, self._shapes(config, folder), state, max_shard_bytes)
        add_checksums(folder, [CONFIG_JSON])

    def _shapes(self, config: ConfigT, folder: Path) -> dict[str, tuple[int, ...]]:
        return shapes_of(functools.partial(self.network, config), folder)


VAE_FORMAT = NetworkFormat(
    "vae", TextVAEConfig, TextVAE, "cola_vae", "ColaTextVAEModel", "cola_text_vae"
)
DIT_FORMAT = NetworkFormat(
    "dit",
    DiTConfig,
    BlockCausalDiT,
    "cola_dit",
    "ColaDiTModel",
    "cola_dit",
    # It decides what sees what; a VAE's also decides whether its latents depend on later tokens.
    free_settings=frozenset({"block_size"}),
)
CODEBOOK_DIT_FORMAT = dataclasses.replace(
    DIT_FORMAT,
    folder_name="cola_codebook_dit",
    architecture="ColaCodebookDiTModel",
    model_type="cola_codebook_dit",
)


def dit_format(config: DiTConfig) -> NetworkFormat[BlockCausalDiT, DiTConfig]:
    """How a DiT is stored."""
    return DIT_FORMAT if config.head == "velocity" else CODEBOOK_DIT_FORMAT


def dit_format_in(root: Path) -> NetworkFormat[BlockCausalDiT, DiTConfig] | None:
    """How a checkpoint's DiT is stored; None where it has none."""
    return next((one for one in (DIT_FORMAT, CODEBOOK_DIT_FORMAT) if one.is_in(root)), None)


def find_root(folder: str | Path) -> Path:
    """The folder that holds `cola_dlm`: the given one, or its `hf` (a run folder)."""
    folder = Path(folder)
    for root in (folder, folder / EXPORT):
        if VAE_FORMAT.is_in(root):
            return root
    raise UserError(
        f"{folder} {absence(folder)}has no cola_dlm/cola_vae (nor hf/cola_dlm/cola_vae): give a "
        "checkpoint in the released layout, or a run folder that has been exported (cola-train "
        f"export RUN).{pickle_hint(folder)}"
    )


@dataclasses.dataclass(frozen=True)
class FixedLogSNR(Below):
    """A VAE's weights with a fixed logSNR, which the encoder's final layer then states.

    Training does not use that layer's log-variance half: here its weight is 0, its bias -logSNR.
    """

    log_snr: float
    channels: int

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        if name.startswith("encoder.final_layer."):
            value = value.clone()
            value[self.channels :] = 0.0 if name.endswith(".weight") else -self.log_snr
        return value


def vae_weights(config: ColaRunConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A run's VAE as it is exported, by names in the VAE, from the objective's weights."""
    fixed = config.fixed_log_snr
    if fixed is None:
        return Below(weights, "vae.")
    return FixedLogSNR(weights, "vae.", fixed, config.vae.latent_dim)


def write_checkpoint(
    folder: Path,
    vae: tuple[TextVAEConfig, Mapping[str, Tensor]],
    dit: tuple[DiTConfig, Mapping[str, Tensor]] | None,
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    *,
    replace: bool,
    max_shard_bytes: int,
) -> None:
    """Write configs and state dicts in fp32, atomically: the folder is old, new or absent.

    Of a state dict one file's tensors are asked for at a time, at most max_shard_bytes of them (or
    a single larger one). `training` (stage, step, seq_len) goes to a file of its own, which the
    released code does not read. Warns where the VAE scales its latents.
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
        VAE_FORMAT.write(working, *vae, max_shard_bytes)
        if dit is not None:
            dit_format(dit[0]).write(working, *dit, max_shard_bytes)
        tokenizer.save(working / "tokenizer.json")
        if training:
            write_json(working / TRAINING, training)
        add_checksums(working, ["tokenizer.json", NAMES_FILE, TRAINING])

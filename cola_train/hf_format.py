"""The released checkpoint layout, both ways: <root>/cola_dlm/{cola_vae,cola_dit}/ and <root>/tokenizer.json."""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_train.config.models import DiTConfig, TextVAEConfig, check_pair
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import atomic_folder
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES, load_tensors, read_json, read_tensors, write_json, write_tensors

_TRAINING = "training.json"
_VAE_FOLDER, _DIT_FOLDER = "cola_vae", "cola_dit"


class Trained:
    """A checkpoint that may say how it was trained.

    Attributes:
        casts: copies of its networks for computing in bf16, by network and device, half the size of the weights; made when first
            sampled from (sampling/precision.py) and kept as long as the checkpoint. They do not follow the weights: whoever changes
            these in place afterwards empties it, or makes another checkpoint, as `dataclasses.replace` does.
    """

    training: dict[str, Any]
    casts: dict[tuple[nn.Module, torch.device], nn.Module]

    @property
    def trained_seq_len(self) -> int | None:
        """Tokens in a row of training, where the checkpoint says."""
        seq_len = self.training.get("seq_len")
        return seq_len if isinstance(seq_len, int) else None

    @property
    def masks_documents(self) -> bool:
        """Whether training kept documents of a row apart; False where the checkpoint does not say."""
        return self.training.get("mask_documents") is True


@dataclasses.dataclass
class Checkpoint(Trained):
    """A VAE, a DiT (absent after stage 1) and the tokenizer, in memory, in fp32, ready for inference."""

    vae: TextVAE
    dit: BlockCausalDiT | None
    tokenizer: Tokenizer
    training: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `cola-train` wrote of the run; {} if released
    casts: dict[tuple[nn.Module, torch.device], nn.Module] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Checkpoint":
        """Read a folder in the released layout, ours or the released one; a run folder stands for its `hf` export.

        Raises:
            UserError: not such a folder; a config field that is unknown or unsupported; any tensor missing, unexpected or
                of the wrong shape (all are named); a truncated file; a tokenizer with more ids than the VAE.
        """
        root = find_root(folder)
        vae = TextVAE(read_vae_config(root))
        load_tensors(vae, _network_folder(root, _VAE_FOLDER))
        dit = None
        if (root / "cola_dlm" / _DIT_FOLDER).is_dir():
            dit = BlockCausalDiT(read_dit_config(root))
            check_pair(vae.config, dit.config)
            load_tensors(dit, _network_folder(root, _DIT_FOLDER))
        tokenizer = Tokenizer.load(root / "tokenizer.json")
        if tokenizer.vocab_size > vae.config.vocab_size:
            raise UserError(
                f"{root}: the tokenizer has {tokenizer.vocab_size} ids, the VAE only {vae.config.vocab_size}; "
                "put the tokenizer.json there that the checkpoint was trained with."
            )
        for network in (vae, dit):
            if network is not None:
                network.to(device).eval().requires_grad_(False)
        training = read_json(root / _TRAINING)[0] if (root / _TRAINING).is_file() else {}
        return cls(vae, dit, tokenizer, training)

    def save(self, folder: str | Path, *, replace: bool = False, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> None:
        """Write the released layout, atomically; `replace` allows an existing folder to be swapped for the new one."""
        dit = None if self.dit is None else (self.dit.config, self.dit.state_dict())
        vae = (self.vae.config, self.vae.state_dict())
        write_checkpoint(Path(folder), vae, dit, self.tokenizer, self.training, replace=replace, max_shard_bytes=max_shard_bytes)


def find_root(folder: str | Path) -> Path:
    """The folder that holds `cola_dlm`: the given one, or its `hf` (a run folder)."""
    folder = Path(folder)
    for root in (folder, folder / "hf"):
        if (root / "cola_dlm" / _VAE_FOLDER).is_dir():
            return root
    what = "has no" if folder.is_dir() else "does not exist, so it has no"
    raise UserError(
        f"{folder} {what} cola_dlm/{_VAE_FOLDER} (nor hf/cola_dlm/{_VAE_FOLDER}): give a checkpoint in the released layout, "
        "or a run folder that has been exported (cola-train export RUN)."
    )


def read_vae_config(root: Path) -> TextVAEConfig:
    """The VAE's config.json under `root`."""
    return TextVAEConfig.from_json(*read_json(_network_folder(root, _VAE_FOLDER) / "config.json"))


def read_dit_config(root: Path) -> DiTConfig:
    """The DiT's config.json under `root`."""
    return DiTConfig.from_json(*read_json(_network_folder(root, _DIT_FOLDER) / "config.json"))


def check_vae_fits(folder: str | Path, config: TextVAEConfig) -> None:
    """Refuse a checkpoint whose VAE has another configuration than `config`."""
    root = find_root(folder)
    _same_config(read_vae_config(root), config, root, "vae")


def check_dit_fits(folder: str | Path, config: DiTConfig) -> None:
    """Refuse a checkpoint whose DiT is absent or has another configuration than `config`."""
    root = find_root(folder)
    _same_config(read_dit_config(root), config, root, "dit")


def vae_tensors(folder: str | Path, config: TextVAEConfig) -> Iterator[tuple[str, Tensor]]:
    """The VAE's tensors by name, one at a time, refusing a checkpoint of another configuration than `config`."""
    check_vae_fits(folder, config)
    return read_tensors(_shapes(TextVAE, config), _network_folder(find_root(folder), _VAE_FOLDER))


def dit_tensors(folder: str | Path, config: DiTConfig) -> Iterator[tuple[str, Tensor]]:
    """The DiT's tensors by name, one at a time, refusing a checkpoint of another configuration than `config`."""
    check_dit_fits(folder, config)
    return read_tensors(_shapes(BlockCausalDiT, config), _network_folder(find_root(folder), _DIT_FOLDER))


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
    """Write configs and state dicts in the released layout, fp32, atomically: the folder is old, new or absent, never half.

    Of a state dict one file's tensors are asked for at a time, at most max_shard_bytes of them (or a single larger one).
    `training` (stage, step, seq_len) goes to a file of its own, which the released code does not read. Warns where the VAE scales
    its latents.
    """
    scale, shift = vae[0].scaling_factor, vae[0].shifting_factor
    if (scale, shift) != (1.0, 0.0):
        warnings.warn(
            f"The VAE has scaling_factor {scale} and shifting_factor {shift}. The released sampler does not undo them before it "
            "decodes, so it will generate wrong text from this checkpoint; only 1 and 0 give the same there as here.",
            stacklevel=2,
        )
    with atomic_folder(folder, replace=replace) as working:
        _write_network(working, _VAE_FOLDER, "ColaTextVAEModel", "cola_text_vae", vae, max_shard_bytes)
        if dit is not None:
            _write_network(working, _DIT_FOLDER, "ColaDiTModel", "cola_dit", dit, max_shard_bytes)
        tokenizer.save(working / "tokenizer.json")
        if training:
            write_json(working / _TRAINING, training)


def _write_network(
    root: Path, name: str, architecture: str, model_type: str, network: tuple[Any, Mapping[str, Tensor]], max_shard_bytes: int
) -> None:
    config, state = network
    folder = root / "cola_dlm" / name
    folder.mkdir(parents=True)
    fields = {**config.to_json(), "architectures": [architecture], "model_type": model_type}
    write_json(folder / "config.json", {**fields, "dtype": "float32", "torch_dtype": "float32"})
    network_class = TextVAE if name == _VAE_FOLDER else BlockCausalDiT
    write_tensors(folder, _shapes(network_class, config), state, max_shard_bytes)


def _network_folder(root: Path, name: str) -> Path:
    folder = root / "cola_dlm" / name
    if not folder.is_dir():
        raise UserError(f"{root} has no cola_dlm/{name}; a checkpoint of stage 1 holds the VAE only, stage 2 adds the DiT.")
    return folder


def _same_config(given: TextVAEConfig | DiTConfig, wanted: TextVAEConfig | DiTConfig, root: Path, section: str) -> None:
    theirs, ours = given.to_json(), wanted.to_json()
    # How weights were once drawn says nothing about the network.
    differing = [name for name in ours if ours[name] != theirs[name] and not name.startswith("init_")]
    if differing:
        listed = ", ".join(f"{section}.{name}: checkpoint {theirs[name]!r}, config {ours[name]!r}" for name in differing)
        raise UserError(
            f"The checkpoint {root} does not fit this run's config ({listed}). Set the config's values to the checkpoint's."
        )


def _shapes(network: type[nn.Module], config: TextVAEConfig | DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in network(config).state_dict().items()}

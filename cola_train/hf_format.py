"""The released checkpoint layout, both ways: <root>/cola_dlm/{cola_vae,cola_dit}/ and <root>/tokenizer.json."""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cola_train.config.models import DiTConfig, TextVAEConfig, check_pair
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import atomic_folder
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TRAINING = "training.json"
_VAE_FOLDER, _DIT_FOLDER = "cola_vae", "cola_dit"


@dataclasses.dataclass
class Checkpoint:
    """A VAE, a DiT (absent after stage 1) and the tokenizer, in memory, in fp32, ready for inference."""

    vae: TextVAE
    dit: BlockCausalDiT | None
    tokenizer: Tokenizer
    training: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `cola-train` wrote of the run; {} if released

    @property
    def trained_seq_len(self) -> int | None:
        """Tokens in a row of training, where the checkpoint says."""
        seq_len = self.training.get("seq_len")
        return seq_len if isinstance(seq_len, int) else None

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "Checkpoint":
        """Read a folder in the released layout, ours or the released one; a run folder stands for its `hf` export.

        Raises:
            UserError: not such a folder; a config field that is unknown or unsupported; any tensor missing, unexpected or
                of the wrong shape (all are named); a truncated file; a tokenizer with more ids than the VAE.
        """
        root = find_root(folder)
        vae = TextVAE(read_vae_config(root))
        _load_weights(vae, _network_folder(root, _VAE_FOLDER))
        dit = None
        if (root / "cola_dlm" / _DIT_FOLDER).is_dir():
            dit = BlockCausalDiT(read_dit_config(root))
            check_pair(vae.config, dit.config)
            _load_weights(dit, _network_folder(root, _DIT_FOLDER))
        tokenizer = Tokenizer.load(root / "tokenizer.json")
        if tokenizer.vocab_size > vae.config.vocab_size:
            raise UserError(
                f"{root}: the tokenizer has {tokenizer.vocab_size} ids, the VAE only {vae.config.vocab_size}; "
                "put the tokenizer.json there that the checkpoint was trained with."
            )
        for network in (vae, dit):
            if network is not None:
                network.to(device).eval().requires_grad_(False)
        training = _read_json(root / _TRAINING)[0] if (root / _TRAINING).is_file() else {}
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
    return TextVAEConfig.from_json(*_read_json(_network_folder(root, _VAE_FOLDER) / "config.json"))


def read_dit_config(root: Path) -> DiTConfig:
    """The DiT's config.json under `root`."""
    return DiTConfig.from_json(*_read_json(_network_folder(root, _DIT_FOLDER) / "config.json"))


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
    return _tensors(_shapes(TextVAE, config), _network_folder(find_root(folder), _VAE_FOLDER))


def dit_tensors(folder: str | Path, config: DiTConfig) -> Iterator[tuple[str, Tensor]]:
    """The DiT's tensors by name, one at a time, refusing a checkpoint of another configuration than `config`."""
    check_dit_fits(folder, config)
    return _tensors(_shapes(BlockCausalDiT, config), _network_folder(find_root(folder), _DIT_FOLDER))


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
            (working / _TRAINING).write_text(json.dumps(training, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_network(
    root: Path, name: str, architecture: str, model_type: str, network: tuple[Any, Mapping[str, Tensor]], max_shard_bytes: int
) -> None:
    config, state = network
    folder = root / "cola_dlm" / name
    folder.mkdir(parents=True)
    fields = {**config.to_json(), "architectures": [architecture], "model_type": model_type}
    fields |= {"dtype": "float32", "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    network_class = TextVAE if name == _VAE_FOLDER else BlockCausalDiT
    sizes = {key: 4 * math.prod(shape) for key, shape in _shapes(network_class, config).items()}
    shards = _split(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # Only now are this file's tensors asked for: a state that reads them from disk is never whole in memory.
        tensors = {key: state[key].detach().to("cpu", torch.float32).contiguous() for key in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # or two files' would be in memory while the next one's are read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _split(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _network_folder(root: Path, name: str) -> Path:
    folder = root / "cola_dlm" / name
    if not folder.is_dir():
        raise UserError(f"{root} has no cola_dlm/{name}; a checkpoint of stage 1 holds the VAE only, stage 2 adds the DiT.")
    return folder


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the checkpoint is incomplete, copy or export it again.") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy or export the checkpoint again.") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} must hold an object of fields, not a {type(fields).__name__}.")
    return fields, str(path)


def _same_config(given: TextVAEConfig | DiTConfig, wanted: TextVAEConfig | DiTConfig, root: Path, section: str) -> None:
    theirs, ours = given.to_json(), wanted.to_json()
    # How weights were once drawn says nothing about the network.
    differing = [name for name in ours if ours[name] != theirs[name] and not name.startswith("init_")]
    if differing:
        listed = ", ".join(f"{section}.{name}: checkpoint {theirs[name]!r}, config {ours[name]!r}" for name in differing)
        raise UserError(
            f"The checkpoint {root} does not fit this run's config ({listed}). Set the config's values to the checkpoint's."
        )


def _load_weights(network: nn.Module, folder: Path) -> None:
    wanted = network.state_dict()
    for name, tensor in _tensors({name: tuple(value.shape) for name, value in wanted.items()}, folder):
        wanted[name].copy_(tensor)


def _shapes(network: type[nn.Module], config: TextVAEConfig | DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in network(config).state_dict().items()}


def _tensors(wanted: Mapping[str, tuple[int, ...]], folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a network's folder, once all names and shapes are known to be the wanted ones."""
    files = _weight_files(folder)
    problems, seen = [], set()
    for path in files:
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                seen.add(name)
                if name not in wanted:
                    problems.append(f"{name}: unexpected")
                elif (shape := tuple(file.get_slice(name).get_shape())) != wanted[name]:
                    problems.append(f"{name}: shape {shape}, the config needs {wanted[name]}")
    problems += [f"{name}: missing" for name in wanted if name not in seen]
    if problems:
        raise UserError(f"The tensors in {folder} do not fit its config.json:\n  " + "\n  ".join(problems))
    return _read_in_turn(files)


def _read_in_turn(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path} is corrupt or truncated ({error}); copy or export the checkpoint again.") from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise UserError(f"{folder} has neither {_SINGLE} nor {_INDEX}; the checkpoint is incomplete, copy or export it again.")
    index, origin = _read_json(folder / _INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UserError(f"{origin} has no usable weight_map; copy or export the checkpoint again.")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing though {_INDEX} names it; copy or export the checkpoint again.")
    return files

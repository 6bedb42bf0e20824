"""Networks' tensors in safetensors files, in Hugging Face's layout, and the JSON beside them.

checksums.json beside the tensors' files, which no other program reads, has their sizes and
checksums.
"""

import contextlib
import dataclasses
import functools
import json
import math
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cola_train.checksums import FileChecksum, damage, file_checksum
from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.files import lfs_hint, read_errors_explained
from cola_train.json_text import parse_json

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
TRAINING = "training.json"  # what a checkpoint says of the run that it comes from
CHECKSUMS = "checksums.json"
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TYPES = ("F32", "F16", "BF16", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def model_type(folder: Path) -> object:
    """The model_type in a Hugging Face folder's config.json; None where there is none.

    Raises:
        UserError: as of `read_json`.
    """
    path = folder / "config.json"
    return read_json(path)[0].get("model_type") if path.is_file() else None


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The fields of a JSON file, and its name for messages.

    Raises:
        UserError: it is missing, or holds no object.
    """
    require(
        path.is_file(), f"{path} is missing; the checkpoint is incomplete, copy or export it again."
    )
    with read_errors_explained(path):
        content = path.read_bytes()
    try:
        fields = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); copy or export the checkpoint again."
            f"{lfs_hint(path)}"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{path} must hold an object of fields, not a {type(fields).__name__}; copy or export "
            "the checkpoint again."
        )
    return fields, str(path)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Sorted and indented, to be read by people too."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_tensors(network: nn.Module, folder: Path) -> None:
    """Give a network its folder's values; as `read_tensors`."""
    wanted = network.state_dict()
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    for name, tensor in read_tensors(shapes, folder):
        wanted[name].copy_(tensor)


def read_tensors(
    wanted: Mapping[str, tuple[int, ...]], folder: Path
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a network's folder, once all names, shapes and types are as wanted.

    Raises:
        UserError: these are not, for all tensors at once; a file that is missing, corrupt or not
            the one that was exported; and, when its turn comes, a tensor that is not finite.
    """
    files = _weight_files(folder)
    problems, seen = [], set()
    for path in files:
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                stored = file.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if name in seen:
                    problems.append(f"{name}: in two files")
                elif name not in wanted:
                    problems.append(f"{name}: unexpected")
                elif shape != wanted[name]:
                    problems.append(f"{name}: shape {shape}, the config needs {wanted[name]}")
                elif kind not in _TYPES:
                    problems.append(f"{name}: type {kind}, weights are {', '.join(_TYPES)}")
                seen.add(name)
    problems += [f"{name}: missing" for name in wanted if name not in seen]
    if problems:
        raise UserError(
            f"The tensors in {folder} do not fit its config.json:\n  " + "\n  ".join(problems)
        )
    _refuse_altered(folder, files)
    return _read_in_turn(files)


def _read_in_turn(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with _open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                count = int(tensor.isfinite().logical_not().sum())
                require(
                    count == 0,
                    f"{path}: {name} has {count:,} of {tensor.numel():,} values that are not "
                    "finite (NaN or infinite), so the model can say nothing. It is damaged, or its "
                    "training diverged: copy or export it again, or take an earlier checkpoint.",
                )
                yield name, tensor


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is corrupt or truncated ({error}); copy or export the checkpoint again."
            f"{lfs_hint(path)}"
        ) from None


def _refuse_altered(folder: Path, files: Sequence[Path]) -> None:
    if not (folder / CHECKSUMS).is_file():
        _say_unchecked(files[0])
        return
    facts, origin = read_json(folder / CHECKSUMS)
    again = (
        "Copy or export the checkpoint again; if you changed its weights yourself, remove "
        f"{CHECKSUMS}."
    )
    try:
        expected = {path.name: FileChecksum(**facts[path.name]) for path in files}
    except (KeyError, TypeError):
        names = ", ".join(path.name for path in files)
        raise UserError(f"{origin} does not have size and checksum of {names}. {again}") from None
    problems = damage(folder, expected, CHECKSUMS)
    require(not problems, f"{folder}: {'; '.join(problems)}. {again}")


@functools.cache
def _say_unchecked(path: Path) -> None:
    say(
        f"{path} has no {CHECKSUMS} beside it, which exports of this program have: whether its "
        "weights are as they were written cannot be checked."
    )


def absence(folder: Path) -> str:
    """Why a folder cannot hold anything, for messages: it is none; "" where it is one."""
    if folder.is_dir():
        return ""
    return "is a file, so it " if folder.exists() else "does not exist, so it "


def pickle_hint(path: Path) -> str:
    """The end of a message about a folder or file without safetensors: has it pickled weights?"""
    found = sorted(path.glob("*")) if path.is_dir() else [path]
    names = [one.name for one in found if one.suffix in _PICKLES]
    if not names:
        return ""
    return (
        f" {names[0]} is of Python's pickle, which can run any code when it is read, so it never "
        f"is: get the weights as {_SINGLE}, or convert them where you trust their origin."
    )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise UserError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}; the checkpoint is incomplete, copy or "
            f"export it again.{pickle_hint(folder)}"
        )
    index, origin = read_json(folder / _INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UserError(f"{origin} has no usable weight_map; copy or export the checkpoint again.")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(
                f"{path} is missing though {_INDEX} names it; copy or export the checkpoint again."
            )
    return files


def write_tensors(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    state: Mapping[str, Tensor],
    max_shard_bytes: int,
) -> None:
    """Write `state`, of `shapes`, in fp32 files of at most max_shard_bytes or one larger tensor.

    Raises:
        OSError: the disk refuses.
    """
    sizes = {key: 4 * math.prod(shape) for key, shape in shapes.items()}
    shards = _split(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else _SINGLE
        # Only now are this file's tensors asked for: a state that reads them from disk is never
        # whole in memory.
        tensors = {key: state[key].detach().to("cpu", torch.float32).contiguous() for key in names}
        path = folder / file
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)  # the user's own; safetensors leaves others none
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        path.chmod(mode)
        del tensors  # or two files' would be in memory while the next one's are read
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / _INDEX, index)
    files = dict.fromkeys(weight_map.values())
    facts = {name: dataclasses.asdict(file_checksum(folder / name)) for name in files}
    write_json(folder / CHECKSUMS, facts)


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


@dataclasses.dataclass(frozen=True)
class Below(Mapping[str, Tensor]):
    """A lazy view of the tensors whose names begin with a prefix, by the rest of their names."""

    weights: Mapping[str, Tensor]
    prefix: str

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (
            name.removeprefix(self.prefix) for name in self.weights if name.startswith(self.prefix)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

"""Networks' tensors in safetensors files, in Hugging Face's layout."""

import contextlib
import dataclasses
import math
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cola_train.config.content import open_file
from cola_train.config.settings import UserError, require
from cola_train.export_files import (
    CONFIG_JSON,
    add_checksums,
    read_json,
    refuse_altered,
    write_json,
)
from cola_train.files import lfs_hint

DEFAULT_MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TYPES = ("F32", "F16", "BF16", "F64")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NetworkT = TypeVar("NetworkT", bound=nn.Module)


def load_network(build: Callable[[], NetworkT], num_blocks: int, folder: Path) -> NetworkT:
    """A network of so many blocks with its folder's values; as `read_tensors`."""
    # Each before the next, which would take memory and time without bound: a config may say
    # anything.
    names = [name for path in _weight_files(folder) for name in _names_in(path)]
    require(
        num_blocks <= len(names),
        f"{folder / CONFIG_JSON} says {num_blocks:,} blocks, and the weights beside it are "
        f"{len(names):,} tensors; copy or export the checkpoint again.",
    )
    tensors = read_tensors(shapes_of(build, folder), folder)
    network = build()
    _fill(network, tensors)
    return network


def load_tensors(network: nn.Module, folder: Path) -> None:
    """Give a network its folder's values; as `read_tensors`."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    _fill(network, read_tensors(shapes, folder))


def _fill(network: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    state = network.state_dict()
    for name, tensor in tensors:
        state[name].copy_(tensor)


def shapes_of(build: Callable[[], nn.Module], origin: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a network, which takes no memory for them.

    Raises:
        UserError: they are more than any memory; `origin` says so.
    """
    try:
        with torch.device("meta"):
            state = build().state_dict()
    except RuntimeError as error:  # a number of bytes that does not fit into 64 bits
        problem = str(error).splitlines()[0]
        raise UserError(f"{origin} describes no network that can be built: {problem}") from None
    return {name: tuple(value.shape) for name, value in state.items()}


def _names_in(path: Path) -> list[str]:
    with _open_safetensors(path) as file:
        return list(file.keys())


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
    names = [path.name for path in files]
    refuse_altered(folder, [CONFIG_JSON, _INDEX], needed=names)
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
        open_file(path).close()  # safetensors would wait for a pipe
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is corrupt or truncated ({error}); copy or export the checkpoint again."
            f"{lfs_hint(path)}"
        ) from None


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

    They are put on record in checksums.json.

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
    add_checksums(folder, [*dict.fromkeys(weight_map.values()), _INDEX])


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

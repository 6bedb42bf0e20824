"""What a training step allocates and releases, in order, and what for.

This reads private sides of torch; each has a comment on what breaks where torch changes it.
"""

import dataclasses
import enum
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from cola_train.processes import local_part
from cola_train.scaling.layers import Section, repeated

Bytes = npt.NDArray[np.int64]


class MemoryPart(enum.IntEnum):
    """What memory is for: the columns of a timeline."""

    WEIGHTS = 0  # this process' shard, fp32, frozen ones and buffers included
    GRADIENTS = 1  # this process' shard, reduced
    OPTIMIZER = 2
    EMA = 3
    GATHERED = 4  # whole units while they compute, and the buffers they are gathered through
    UNREDUCED = 5  # whole gradients: of units until they are reduced, of all between micro-batches
    REDUCING = 6  # the buffers that gradients are reduced from
    ACTIVATIONS = 7  # kept by the forward pass for the backward pass
    LOGITS = 8  # one number per token id: logits, log-probabilities, their gradients
    TEMPORARIES = 9  # the rest: gradients of activations, recomputed activations


SHARDED = (MemoryPart.WEIGHTS, MemoryPart.GRADIENTS, MemoryPart.OPTIMIZER, MemoryPart.EMA)
"""Parts of which each process holds its shard; parallel.cpu_offload keeps these in host memory."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes alive after each event (an allocation or release) of a step: fixed + rows x per_row."""

    fixed: Bytes  # (events, parts)
    per_row: Bytes  # (events, parts)

    def at(self, rows: int) -> Bytes:
        """The bytes with a micro-batch of `rows`, (events, parts)."""
        return self.fixed + rows * self.per_row

    def peak(self, rows: int) -> int:
        """The most bytes at one moment."""
        return int(self.at(rows).sum(axis=1).max())

    def most_rows(self, most_bytes: int) -> int:
        """The most rows whose peak is at most `most_bytes`; 0 if there are none."""
        fixed, per_row = self.fixed.sum(axis=1), self.per_row.sum(axis=1)
        growing = per_row > 0
        if fixed.max() > most_bytes:
            return 0
        return int(((most_bytes - fixed[growing]) // per_row[growing]).min())

    def resharded(self, factor: int) -> "Timeline":
        """The timeline with shards of `factor` times the size; 0 for shards that lie elsewhere."""
        fixed = self.fixed.copy()
        fixed[:, SHARDED] *= factor
        return Timeline(fixed, self.per_row)

    def accumulating(self) -> "Timeline":
        """The timeline of a step of several micro-batches, where this is of a single one.

        Before the last one, gradients are neither reduced nor sharded but added up, whole, on each
        process (FSDP2 without gradient sync); in the last one each unit gives up its sum when it is
        reduced.
        """
        reduced_now = np.maximum(np.diff(self.fixed[:, MemoryPart.REDUCING], prepend=0), 0)
        whole = reduced_now.sum()
        before, last = self.fixed.copy(), self.fixed.copy()
        before[:, (MemoryPart.GRADIENTS, MemoryPart.REDUCING)] = 0
        before[:, MemoryPart.UNREDUCED] += whole
        # A unit's sum lives until it is copied into the buffer, so it still counts at that event.
        last[:, MemoryPart.UNREDUCED] += whole - reduced_now.cumsum() + reduced_now
        return Timeline(np.concatenate([before, last]), np.tile(self.per_row, (2, 1)))


class AllocationLog:
    """Every storage's allocations, resizings and release, in order, and what it is for."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._is_open = True
        self._changes: list[tuple[int, int]] = []  # (storage, bytes more or less)
        # By a storage's number, in the order in which they are seen.
        self._parts: list[MemoryPart | None] = []
        self._sizes: list[int] = []
        # By section: which layer begins, and before which event.
        self._entered: dict[Section, list[tuple[int, int]]] = {}
        self._order: slice | npt.NDArray[np.int64] = slice(None)
        # A living storage's number, and the reference that notes its release. The key is `_cdata`,
        # the address of the C++ object: Python's wrappers of one storage may differ. If torch no
        # longer gave it, each storage would be counted once for each tensor over it.
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def take(self, part: MemoryPart, tensors: Sequence[Tensor]) -> None:
        """Count these tensors' storages as `part`."""
        # With gradients on, taking each DTensor's shard would be a call of an autograd function.
        with torch.no_grad():
            for tensor in tensors:
                self._parts[self._number(local_part(tensor))] = part

    def take_rest(self, part: MemoryPart) -> None:
        """Count all living storages that are of no part yet as `part`."""
        for number, _ in self._known.values():
            if self._parts[number] is None:
                self._parts[number] = part

    def saw(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note an operator's call, its new storages above all."""
        leaves = [result] if isinstance(result, Tensor) else pytree.tree_leaves(result)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # FSDP2's own operators. If torch renames them, this fails; if FSDP2 no longer calls them,
        # what they take is counted as temporaries, and `accumulating` finds no gradients.
        if operator is torch.ops.fsdp.all_gather_copy_in.default:
            self.take(MemoryPart.GATHERED, tensors)
        elif operator is torch.ops.fsdp.chunk_cat.default:
            # It copies a unit's gradients into the buffer that they are reduced from.
            self.take(MemoryPart.UNREDUCED, args[0])
            self.take(MemoryPart.REDUCING, [kwargs["out"]])
        for tensor in tensors:
            number = self._number(tensor)
            per_id = tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size
            if per_id and self._parts[number] is None:
                self._parts[number] = MemoryPart.LOGITS

    def enter(self, section: Section, layer: int) -> None:
        """Note that a layer's part of a section begins."""
        self._entered.setdefault(section, []).append((layer, len(self._changes)))

    def repeat_layers(self, left_out: Mapping[str, int]) -> None:
        """Repeat an inner layer's events once for each layer of its stack that was left out.

        Raises:
            UnequalLayersError: see `layers.repeated`.
        """
        events = list(zip(self.parts(), (size for _, size in self._changes), strict=True))
        self._order = repeated(events, self._entered, left_out)

    def close(self) -> None:
        """Note nothing more."""
        self._is_open = False

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note a storage's new size, if the storage is known."""
        if storage._cdata in self._known:
            self._now(self._known[storage._cdata][0], storage.nbytes())

    def parts(self) -> list[MemoryPart]:
        """The part of each event."""
        return [
            part if (part := self._parts[number]) is not None else MemoryPart.TEMPORARIES
            for number, _ in self._changes
        ]

    def live(self) -> Bytes:
        """The bytes alive after each event, (events, parts)."""
        return self._by_part([size for _, size in self._changes])

    def live_apart(self, units: int) -> tuple[Bytes, Bytes]:
        """The bytes alive after each event: those that no rows add, and those of a unit of rows.

        So many `units` of rows were recorded: more than twice the bytes of any storage that has
        none of rows, so that each storage's bytes tell both.
        """
        changes: list[tuple[int, int]] = []
        for number, change in self._changes:
            of_unit, fixed = divmod(abs(change), units)
            assert fixed < units // 2, (
                f"{change} bytes ({self._parts[number]}) with {units} units are not fixed + units "
                "x bytes"
            )
            changes.append((fixed, of_unit) if change > 0 else (-fixed, -of_unit))
        fixed_changes, unit_changes = zip(*changes, strict=True)
        return self._by_part(fixed_changes), self._by_part(unit_changes)

    def _by_part(self, changes: Sequence[int]) -> Bytes:
        by_part = np.zeros((len(self._changes), len(MemoryPart)), dtype=np.int64)
        by_part[np.arange(len(self._changes)), self.parts()] = changes
        return by_part[self._order].cumsum(axis=0)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._known:
            number = len(self._parts)
            self._parts.append(None)
            self._sizes.append(0)
            self._known[address] = number, weakref.ref(storage, lambda _: self._released(address))
            self._now(number, storage.nbytes())
        return self._known[address][0]

    def _released(self, address: int) -> None:
        number, _ = self._known.pop(address)
        self._now(number, 0)

    def _now(self, number: int, size: int) -> None:
        if self._is_open and size != self._sizes[number]:
            self._changes.append((number, size - self._sizes[number]))
            self._sizes[number] = size

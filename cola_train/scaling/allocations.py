"""What a step allocates and releases, in order, and what for."""

import contextlib
import dataclasses
import enum
import gc
import unittest.mock
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cola_train.processes import local_part

Bytes = npt.NDArray[np.int64]


class Part(enum.IntEnum):
    """What memory is for: the columns of a timeline."""

    WEIGHTS = 0  # this process' part, fp32, frozen ones and buffers included
    GRADIENTS = 1  # this process' part, reduced
    OPTIMIZER = 2
    EMA = 3
    GATHERED = 4  # whole units, while they compute, and what they are gathered through
    UNREDUCED = 5  # whole gradients: of units until they are reduced, of all between micro-batches
    REDUCING = 6  # the buffers that gradients are reduced from
    ACTIVATIONS = 7  # kept by the forward pass for the backward pass
    LOGITS = 8  # all with one number a token id: logits, log-probabilities, their gradients
    TEMPORARIES = 9  # the rest: gradients of activations, recomputed activations


SHARDED = (Part.WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER, Part.EMA)
"""What each process always has its shard of; parallel.cpu_offload keeps these in host memory."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes that live after each allocation and release of a step, by part: `fixed` + rows x
    `per_row`, (events, parts).
    """

    fixed: Bytes
    per_row: Bytes

    def at(self, rows: int) -> Bytes:
        """The bytes with a micro-batch of `rows`."""
        return self.fixed + rows * self.per_row

    def peak(self, rows: int) -> int:
        """The most bytes at one moment."""
        return int(self.at(rows).sum(axis=1).max())

    def most_rows(self, most_bytes: int) -> int:
        """The largest micro-batch whose peak is at most that; 0 if there is none."""
        fixed, per_row = self.fixed.sum(axis=1), self.per_row.sum(axis=1)
        growing = per_row > 0
        if fixed.max() > most_bytes:
            return 0
        return int(((most_bytes - fixed[growing]) // per_row[growing]).min())

    def resharded(self, factor: int) -> "Timeline":
        """With shards of `factor` times the size."""
        fixed = self.fixed.copy()
        fixed[:, SHARDED] *= factor
        return Timeline(fixed, self.per_row)

    def without(self, parts: Sequence[Part]) -> "Timeline":
        """Without what these parts take."""
        fixed = self.fixed.copy()
        fixed[:, parts] = 0
        return Timeline(fixed, self.per_row)

    def accumulating(self) -> "Timeline":
        """With more than one micro-batch a step, where this is of one.

        Before the last one, gradients are neither reduced nor sharded but added up, whole, on each
        process (FSDP2 without
        gradient sync); in the last one each unit gives up its sum when it is reduced.
        """
        reduced_now = np.maximum(np.diff(self.fixed[:, Part.REDUCING], prepend=0), 0)
        whole = reduced_now.sum()
        before, last = self.fixed.copy(), self.fixed.copy()
        before[:, (Part.GRADIENTS, Part.REDUCING)] = 0
        before[:, Part.UNREDUCED] += whole
        # A unit's sum lives until it has been copied into the buffer, so at that event it still
        # counts.
        last[:, Part.UNREDUCED] += whole - reduced_now.cumsum() + reduced_now
        return Timeline(np.concatenate([before, last]), np.tile(self.per_row, (2, 1)))


class AllocationLog:
    """Every storage's allocation, resizing and release, in order, and what it is for."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._is_open = True
        self._changes: list[tuple[int, int]] = []  # (storage, bytes more or less)
        self._parts: list[Part | None] = []  # of storages, which are numbered as they are seen
        self._sizes: list[int] = []
        # By address: a living storage's number, and the reference that notes its release.
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def take(self, part: Part, tensors: Sequence[Tensor]) -> None:
        """These are for `part`."""
        # With gradients on, each DTensor's part would be a call of an autograd function.
        with torch.no_grad():
            for tensor in tensors:
                self._parts[self._number(local_part(tensor))] = part

    def take_rest(self, part: Part) -> None:
        """All that lives and is for nothing yet is for `part`."""
        for number, _ in self._known.values():
            if self._parts[number] is None:
                self._parts[number] = part

    def saw(self, operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """An operator was called."""
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if operator is torch.ops.fsdp.all_gather_copy_in.default:
            self.take(Part.GATHERED, tensors)
        elif operator is torch.ops.fsdp.chunk_cat.default:
            # Called by FSDP2 to bring a unit's gradients into the buffer that they are reduced
            # from.
            self.take(Part.UNREDUCED, args[0])
            self.take(Part.REDUCING, [kwargs["out"]])
        for tensor in tensors:
            number = self._number(tensor)
            if (
                self._parts[number] is None
                and tensor.dim() > 1
                and tensor.shape[-1] == self._vocab_size
            ):
                self._parts[number] = Part.LOGITS

    def close(self) -> None:
        """Note nothing more."""
        self._is_open = False

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size than before, if it is known."""
        if storage._cdata in self._known:
            self._now(self._known[storage._cdata][0], storage.nbytes())

    def parts(self) -> list[Part]:
        """What each change is of."""
        return [
            part if (part := self._parts[number]) is not None else Part.TEMPORARIES
            for number, _ in self._changes
        ]

    def live(self) -> Bytes:
        """What lives after each change, by part."""
        return self._by_part([size for _, size in self._changes])

    def live_apart(self, units: int) -> tuple[Bytes, Bytes]:
        """What lives after each change, by part: the bytes that are there anyway, and those of each
        of `units` units of rows.

        Args:
            units: how many were recorded; more than twice the bytes of any storage that is there
                anyway, so that each storage's bytes tell both.
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
        by_part = np.zeros((len(self._changes), len(Part)), dtype=np.int64)
        by_part[np.arange(len(self._changes)), self.parts()] = changes
        return by_part.cumsum(axis=0)

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


class RecordingMode(FakeTensorMode):
    """A fake mode that tells a log about each operator."""

    def __init__(self) -> None:
        # Weights come from the meta device.
        super().__init__(allow_non_fake_inputs=True)
        self._log: AllocationLog | None = None
        self._depth = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See FakeTensorMode."""
        if func is torch.ops.prim.device.default:
            # Half of all calls: FSDP2 asks each parameter, and the fake mode's own answer takes it
            # ten times as long.
            return args[0].fake_device
        # What is fake about an operator may be made of others, which the real one does not call.
        self._depth += 1
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._depth -= 1
        if self._log is not None and self._depth == 0:
            self._log.saw(func, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def recording_to(self, log: AllocationLog) -> Iterator[None]:
        """Fake, and tell `log`, while the block runs."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            log.resized(storage)
            return result

        self._log = log
        # What only the collector of cycles finds would be released at another moment each time.
        gc.collect()
        gc.disable()
        try:
            # FSDP2 empties and fills storages behind the operators' back.
            with unittest.mock.patch.object(torch.UntypedStorage, "resize_", resize_), self:
                yield
        finally:
            gc.enable()
            log.close()
            self._log = None

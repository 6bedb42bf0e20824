"""A training step without its numbers: the real stage, sharded over processes that are not there, its allocations recorded.

Tensors are torch's fake ones, which have shapes and storages but no memory, and collectives go to torch's fake process group.
So what is recorded is what the program does, whatever the stage; only what kernels and libraries use inside is missing.
"""

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
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from cola_train.config.runs import RunConfig
from cola_train.data.datamodule import Batch
from cola_train.models.attention import RowAttention
from cola_train.training.activations import checkpoint_activations
from cola_train.training.average import Average
from cola_train.training.interrupts import StopRequest
from cola_train.training.module import StageModule
from cola_train.training.optim import ensure_state
from cola_train.training.processes import Processes
from cola_train.training.stages import build_stage
from cola_train.training.state import local_part, materialise
from cola_train.training.strategy import build_mesh, check_mesh, gather_each_once, shard
from cola_train.training.watchdog import Watchdog

Bytes = npt.NDArray[np.int64]


class Part(enum.IntEnum):
    """What memory is for: the columns of a timeline."""

    WEIGHTS = 0  # this process' part, fp32, frozen ones and buffers included
    GRADIENTS = 1  # this process' part, reduced
    OPTIMIZER = 2
    AVERAGE = 3
    GATHERED = 4  # whole units, while they compute, and what they are gathered through
    UNREDUCED = 5  # whole gradients: of units until they are reduced, of all between micro-batches
    REDUCING = 6  # the buffers that gradients are reduced from
    ACTIVATIONS = 7  # kept by the forward pass for the backward pass
    LOGITS = 8  # all with one number a token id: logits, log-probabilities, their gradients
    TEMPORARIES = 9  # the rest: gradients of activations, recomputed activations


SHARDED = (Part.WEIGHTS, Part.GRADIENTS, Part.OPTIMIZER, Part.AVERAGE)
"""What each process has its part of, all the time; parallel.cpu_offload keeps these in the host's memory."""


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes that live after each allocation and release of a step, by part: `fixed` + rows x `per_row`, (events, parts)."""

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

        Before the last one, gradients are neither reduced nor sharded but added up, whole, on each process (FSDP2 without
        gradient sync); in the last one each unit gives up its sum when it is reduced.
        """
        reduced_now = np.maximum(np.diff(self.fixed[:, Part.REDUCING], prepend=0), 0)
        whole = reduced_now.sum()
        before, last = self.fixed.copy(), self.fixed.copy()
        before[:, (Part.GRADIENTS, Part.REDUCING)] = 0
        before[:, Part.UNREDUCED] += whole
        # A unit's sum lives until it has been copied into the buffer, so at that event it still counts.
        last[:, Part.UNREDUCED] += whole - reduced_now.cumsum() + reduced_now
        return Timeline(np.concatenate([before, last]), np.tile(self.per_row, (2, 1)))


def record(config: RunConfig, world_size: int, local_world_size: int, device_type: str) -> Timeline:
    """The timeline of process 0's forward and backward of one micro-batch, from a step on that the optimizer has state for.

    Clipping and the optimizer's step need less than the backward pass before them, and are left out. Memory is affine in the
    rows: two recordings, of 2 and 3, tell them all (1 would take shortcuts, such as copies that a dimension of 1 spares).

    Args:
        config: the run; its precision decided, not `auto`.
        world_size: processes of the run.
        local_world_size: those of one machine.
        device_type: "cuda" for the attention kernels of a GPU, "cpu" for those of a CPU.

    Raises:
        UserError: a strategy that does not fit the number of processes.
    """
    processes = Processes(0, world_size, 0, local_world_size)
    check_mesh(config.parallel, processes)
    with _fake_group(world_size), _kernels_of(device_type):
        stage = build_stage(config, processes=processes, stop=StopRequest(), watchdog=Watchdog(0, config.parallel.timeout_seconds))
        mode = _RecordingMode()
        there = _configure(stage, mode)
        two, three = (_record_step(stage, mode, there, rows) for rows in (2, 3))
    assert two.parts() == three.parts(), "the rows of a micro-batch change what is allocated"
    per_row = three.live() - two.live()
    return Timeline(two.live() - 2 * per_row, per_row)


@contextlib.contextmanager
def _fake_group(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _kernels_of(device_type: str) -> Iterator[None]:
    """Attention as on `device_type`: torch without CUDA has no fake CUDA tensors, and its CPU's kernel keeps other things."""
    if device_type == "cpu":
        yield
        return
    with unittest.mock.patch.object(RowAttention, "__call__", _gpu_attention):
        yield


def _gpu_attention(attention: RowAttention, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if attention.visible is None and q.dtype == torch.bfloat16:
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, attention.causal)
        return out  # type: ignore[no-any-return]  # operators are untyped
    bias = None
    if attention.visible is not None:
        # Each call makes its own numbers of the mask, and keeps them.
        bias = torch.where(attention.visible, 0.0, float("-inf")).to(q.dtype).expand(q.shape[0], q.shape[1], -1, -1)
    out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, attention.causal)
    return out  # type: ignore[no-any-return]  # operators are untyped


def _configure(stage: StageModule, mode: "_RecordingMode") -> dict[Part, list[Tensor]]:
    """As StageModule.configure_model, but fake from where memory is given: a mesh reads its tensors' values.

    Returns:
        What is there when a step begins.
    """
    parallel, precision = stage.config.parallel, stage.config.trainer.precision
    with torch.device("meta"):
        objective = stage.build_objective()
    checkpoint_activations(objective, parallel.activation_checkpointing)
    shard(objective, build_mesh(parallel, stage.processes, "cpu"), precision == "bf16", parallel.cpu_offload)
    with mode:
        materialise(objective, "cpu")
        stage.objective = objective
        stage.average = Average(objective, stage.config.ema.decay)
        moments = ensure_state(torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad]))
        # As when a run starts: then each unit has the storage that it is gathered into, empty.
        gather_each_once(objective)
    return {
        Part.WEIGHTS: [*objective.parameters(), *objective.buffers()],
        Part.OPTIMIZER: [tensor for state in moments.values() for tensor in state.values()],
        Part.AVERAGE: list(stage.average.tensors.values()),
        Part.GATHERED: _gathered(objective),
    }


def _gathered(objective: nn.Module) -> list[Tensor]:
    """What FSDP2 gathers each parameter into."""
    states = [module._get_fsdp_state() for module in objective.modules() if isinstance(module, FSDPModule)]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return [copy for group in groups for parameter in group.fsdp_params for copy in parameter.all_gather_outputs]


def _record_step(stage: StageModule, mode: "_RecordingMode", there: dict[Part, list[Tensor]], rows: int) -> "_Log":
    """One forward and backward of a micro-batch of `rows`; no gradients are left behind."""
    log = _Log(stage.config.vocab_size)
    for part, tensors in there.items():
        log.take(part, tensors)
    with mode.recording_to(log):
        batch = _batch(rows, stage.config.data.seq_len)
        counts = {name: count.float() for name, count in stage.objective.counts(batch).items()}  # type: ignore[operator]
        with stage.computing():
            # Of the phases of stage 2's Interval the first trains most.
            loss = stage.losses(batch, counts, step=0).total
        log.take_rest(Part.ACTIVATIONS)
        loss.backward()
        trained = [parameter for parameter in stage.objective.parameters() if parameter.grad is not None]
        log.take(Part.GRADIENTS, [parameter.grad for parameter in trained if parameter.grad is not None])
    for parameter in trained:
        parameter.grad = None
    return log


def _batch(rows: int, seq_len: int) -> Batch:
    whole = torch.zeros(rows, seq_len, dtype=torch.int64)
    index = torch.zeros(rows, dtype=torch.int64)
    return Batch(whole, whole.bool(), whole.clone(), index, index.clone())


class _Log:
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
            # Called by FSDP2 to bring a unit's gradients into the buffer that they are reduced from.
            self.take(Part.UNREDUCED, args[0])
            self.take(Part.REDUCING, [kwargs["out"]])
        for tensor in tensors:
            number = self._number(tensor)
            if self._parts[number] is None and tensor.dim() > 1 and tensor.shape[-1] == self._vocab_size:
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
        return [part if (part := self._parts[number]) is not None else Part.TEMPORARIES for number, _ in self._changes]

    def live(self) -> Bytes:
        """What lives after each change, by part."""
        changes = np.zeros((len(self._changes), len(Part)), dtype=np.int64)
        changes[np.arange(len(self._changes)), self.parts()] = [size for _, size in self._changes]
        return changes.cumsum(axis=0)

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


class _RecordingMode(FakeTensorMode):
    """A fake mode that tells a log about each operator."""

    def __init__(self) -> None:
        # Weights come from the meta device.
        super().__init__(allow_non_fake_inputs=True)
        self._log: _Log | None = None
        self._depth = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See FakeTensorMode."""
        # What is fake about an operator may be made of others, which the real one does not call.
        self._depth += 1
        try:
            result = super().dispatch(func, types, args, kwargs)
        finally:
            self._depth -= 1
        if self._log is not None and self._depth == 0:
            self._log.saw(func, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def recording_to(self, log: _Log) -> Iterator[None]:
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

"""A training step without its numbers: the real stage, sharded over processes that are not there,
its allocations recorded.

Tensors are torch's fake ones, which have shapes and storages but no memory, and collectives go to
torch's fake process group.
So what is recorded is what the program does, whatever the stage; only what kernels and libraries
use inside is missing.
"""

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from cola_train.config.run import RunConfig
from cola_train.data.batch import Batch
from cola_train.models.attention.rows import Attention, RowAttention
from cola_train.models.attention.tiled import TiledAttention, forget_masks
from cola_train.models.vocabulary_head import PARTS
from cola_train.objectives.objective import total_loss
from cola_train.processes import Processes
from cola_train.scaling.allocations import AllocationLog, Bytes, Part, RecordingMode, Timeline
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.watchdog import Watchdog
from cola_train.training.optim.optimizers import ensure_state
from cola_train.training.parallel.activations import Checkpointing, checkpointing_activations
from cola_train.training.parallel.sharding import check_mesh, gather_each_once, sharding_units


def record(
    config: RunConfig,
    world_size: int,
    local_world_size: int,
    device_type: str,
    checkpointing: Sequence[Checkpointing],
) -> list[Timeline]:
    """Timelines of process 0's forward and backward of one micro-batch, from a step on that the
    optimizer has state for.

    Clipping and the optimizer's step need less than the backward pass before them, and are left
    out. The rows of the micro-batch are a multiple of the parts that the vocabulary head cuts
    positions into; with other rows parts differ by a position, which is left out.

    Args:
        config: the run; its precision decided, not `auto`.
        world_size: processes of the run.
        local_world_size: those of one machine.
        device_type: "cuda" for the attention kernels of a GPU, "cpu" for those of a CPU.
        checkpointing: kinds of activation checkpointing, in place of the config's: a timeline of
            each. They share one stage.

    Raises:
        UserError: a strategy that does not fit the number of processes.
    """
    processes = Processes(0, world_size, 0, local_world_size)
    check_mesh(config.parallel, processes)
    config = dataclasses.replace(
        config, parallel=dataclasses.replace(config.parallel, activation_checkpointing="none")
    )
    with _fake_group(world_size), _kernels_of(device_type):
        try:
            return _record(config, processes, checkpointing, _record_once)
        except (RuntimeError, OverflowError) as error:
            # The largest models: so many rows of them have more bytes than 64 bits count.
            if "overflow" not in str(error):
                raise
            return _record(config, processes, checkpointing, _record_twice)


def _record(
    config: RunConfig,
    processes: Processes,
    checkpointing: Sequence[Checkpointing],
    record_timeline: Callable[..., Timeline],
) -> list[Timeline]:
    stage = StageModule(
        config, processes, StopRequest(), Watchdog(0, config.parallel.timeout_seconds)
    )
    mode = RecordingMode()
    there = _configure(stage, mode)
    timelines = []
    for kind in checkpointing:
        with checkpointing_activations(stage.objective, kind):
            timelines.append(record_timeline(stage, mode, there))
    return timelines


def _record_once(
    stage: StageModule, mode: RecordingMode, there: dict[Part, list[Tensor]]
) -> Timeline:
    """By a micro-batch of so many rows that their number exceeds the bytes of whatever has a size
    of its own.
    """
    # The largest such storages are those that a unit is gathered into and reduced from: fp32, with
    # some padding, and twice that.
    units = [_numbers(unit) for unit in sharding_units(stage.objective)]
    root = _numbers(stage.objective) - sum(units)
    many = 1 << (4 * 4 * max(root, *units)).bit_length()
    fixed, of_parts = _record_step(stage, mode, there, many * PARTS).live_apart(many)
    return _affine(fixed + of_parts, fixed + 2 * of_parts)


def _record_twice(
    stage: StageModule, mode: RecordingMode, there: dict[Part, list[Tensor]]
) -> Timeline:
    """By two micro-batches, of different rows."""
    some, more = (_record_step(stage, mode, there, rows) for rows in (PARTS, 2 * PARTS))
    assert some.parts() == more.parts(), "the rows of a micro-batch change what is allocated"
    return _affine(some.live(), more.live())


def _affine(some: Bytes, more: Bytes) -> Timeline:
    """Through what lives with PARTS rows and with twice as many."""
    per_row = (more - some) // PARTS
    return Timeline(some - PARTS * per_row, per_row)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def _fake_group(world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _kernels_of(device_type: str) -> Iterator[None]:
    """Attention as on `device_type`: torch without CUDA has no fake CUDA tensors, and its CPU's
    kernel keeps other things.
    """
    forget_masks()
    try:
        if device_type == "cpu":
            yield
            return
        with (
            unittest.mock.patch.object(RowAttention, "__call__", _gpu_attention),
            unittest.mock.patch.object(TiledAttention, "__call__", _gpu_attention),
        ):
            yield
    finally:
        forget_masks()


def _gpu_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash attention, and FlexAttention in place of tiles: both keep their output and one number a
    query and head.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if q.dtype == torch.bfloat16:
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0)
    else:
        out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0)
    return out


def _configure(stage: StageModule, mode: RecordingMode) -> dict[Part, list[Tensor]]:
    """Configure a stage, fake from where memory is given: a mesh reads its tensors' values.

    Returns:
        What is there when a step begins.
    """
    objective = stage.build_sharded()
    with mode:
        stage.allocate(objective)
        moments = ensure_state(stage.configure_optimizers())
        # As when a run starts: then each unit has the storage that it is gathered into, empty.
        gather_each_once(objective)
    return {
        Part.WEIGHTS: [*objective.parameters(), *objective.buffers()],
        Part.OPTIMIZER: [tensor for state in moments.values() for tensor in state.values()],
        Part.EMA: list(stage.ema.tensors.values()),
        Part.GATHERED: _gathered(objective),
    }


def _gathered(objective: nn.Module) -> list[Tensor]:
    """What FSDP2 gathers each parameter into."""
    states = [
        module._get_fsdp_state() for module in objective.modules() if isinstance(module, FSDPModule)
    ]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return [
        copy
        for group in groups
        for parameter in group.fsdp_params
        for copy in parameter.all_gather_outputs
    ]


def _record_step(
    stage: StageModule, mode: RecordingMode, there: dict[Part, list[Tensor]], rows: int
) -> AllocationLog:
    """One forward and backward of a micro-batch of `rows`; no gradients are left behind."""
    # Each recording makes them, as a run's first step does.
    forget_masks()
    log = AllocationLog(stage.config.vocab_size)
    for part, tensors in there.items():
        log.take(part, tensors)
    with mode.recording_to(log):
        batch = _batch(rows, stage.config.data.seq_len)
        counts = {name: count.float() for name, count in stage.objective.counts(batch).items()}
        with stage.computing():
            # Of a cycle's phases the first trains most.
            terms = stage.objective(batch, 0)
        loss = total_loss(terms, counts)
        log.take_rest(Part.ACTIVATIONS)
        loss.backward()
        trained = [
            parameter for parameter in stage.objective.parameters() if parameter.grad is not None
        ]
        log.take(
            Part.GRADIENTS, [parameter.grad for parameter in trained if parameter.grad is not None]
        )
    for parameter in trained:
        parameter.grad = None
    return log


def _batch(rows: int, seq_len: int) -> Batch:
    whole = torch.zeros(rows, seq_len, dtype=torch.int64)
    index = torch.zeros(rows, dtype=torch.int64)
    return Batch(whole, whole.bool(), whole.clone(), index, index.clone())

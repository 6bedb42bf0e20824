"""A training step without numbers: the real objective, sharded over absent processes, is recorded.

Tensors are torch's fake ones, which have shapes and storages but no memory, and collectives go to
torch's fake process group. So what is recorded is what the program does, whatever the family; only
what kernels and libraries use inside is missing.
"""

import contextlib
import dataclasses
import unittest.mock
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

# Private, of torch's own tests, and no public group needs no other processes: its collectives do
# nothing. Without it no plan could shard; the import would fail.
from torch.testing._internal.distributed.fake_pg import FakeStore

from cola_train.config.run import RunConfig
from cola_train.data.batch import Batch
from cola_train.models.attention.rows import Attention, RowAttention
from cola_train.models.attention.tiled import TiledAttention, forget_masks
from cola_train.models.vocabulary_head import PARTS
from cola_train.objectives.objective import Objective, total_loss
from cola_train.processes import Processes
from cola_train.scaling.allocations import AllocationLog, Bytes, MemoryPart, Timeline
from cola_train.scaling.layers import UnequalLayersError, layer_of, note_layers, shorten
from cola_train.scaling.recording import RecordingMode
from cola_train.training.optim.ema import EMA
from cola_train.training.optim.optimizers import build_optimizer, ensure_state
from cola_train.training.parallel.blocks import Checkpointing, checkpointing_activations
from cola_train.training.parallel.build import build_sharded, computing, materialize
from cola_train.training.parallel.sharding import check_mesh, gather_each_once, sharding_units


@dataclasses.dataclass(frozen=True)
class _DryRun:
    """An objective that is ready for its step."""

    config: RunConfig
    processes: Processes
    objective: Objective
    mode: RecordingMode
    # What exists when a step begins, and what for, by stack and number of its layer; None: of none.
    present: dict[tuple[str, int] | None, list[tuple[MemoryPart, Tensor]]]
    left_out: dict[str, int]  # layers of each stack that do not take part


def record(
    config: RunConfig,
    world_size: int,
    local_world_size: int,
    device_type: str,
    checkpointing: Sequence[Checkpointing],
) -> list[Timeline]:
    """Timelines of process 0's forward and backward of one micro-batch.

    The optimizer has its state already, as from the second step on. Clipping and the optimizer's
    step need less than the backward pass before them, and are left out. The rows of the
    micro-batch are a multiple of the parts that the vocabulary head cuts positions into; with other
    rows parts differ by a position, which is left out.

    The config's precision is decided, not `auto`, and its activation checkpointing is none;
    `device_type` is "cuda" for the attention kernels of a GPU, "cpu" for those of a CPU. Each kind
    of `checkpointing` gives a timeline; they share one objective.

    Raises:
        UserError: a strategy that does not fit the number of processes.
    """
    processes = Processes(0, world_size, 0, local_world_size)
    check_mesh(config.parallel, processes)

    def timelines(shortens: bool, record_timeline: Callable[[_DryRun], Timeline]) -> list[Timeline]:
        run, found = _configure(config, processes, shortens), []
        for kind in checkpointing:
            with checkpointing_activations(run.objective, kind):
                found.append(record_timeline(run))
        return found

    shortens, record_timeline = True, _record_once
    with _fake_devices(world_size, device_type):
        while True:
            try:
                return timelines(shortens, record_timeline)
            except UnequalLayersError:
                shortens = False
            except (RuntimeError, OverflowError) as error:
                # The largest models: so many rows of them have more bytes than 64 bits count.
                if "overflow" not in str(error) or record_timeline is _record_twice:
                    raise
                record_timeline = _record_twice


def _record_once(run: _DryRun) -> Timeline:
    """Record more rows than any storage that does not grow with rows has bytes."""
    # The largest such storages are those that a unit is gathered into and reduced from: fp32, with
    # some padding, and twice that.
    units = [_numbers(unit) for unit in sharding_units(run.objective)]
    root = _numbers(run.objective) - sum(units)
    many = 1 << (4 * 4 * max(root, *units)).bit_length()
    fixed, of_parts = _record_step(run, many * PARTS).live_apart(many)
    return _affine(fixed + of_parts, fixed + 2 * of_parts)


def _record_twice(run: _DryRun) -> Timeline:
    """Record two micro-batches, of different rows."""
    some, more = (_record_step(run, rows) for rows in (PARTS, 2 * PARTS))
    assert some.parts() == more.parts(), "the rows of a micro-batch change what is allocated"
    return _affine(some.live(), more.live())


def _affine(some: Bytes, more: Bytes) -> Timeline:
    """The line through the bytes alive with PARTS rows and those with twice as many."""
    per_row = (more - some) // PARTS
    return Timeline(some - PARTS * per_row, per_row)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def _fake_devices(world_size: int, device_type: str) -> Iterator[None]:
    """The run's group, and attention as on `device_type`: without CUDA, torch fakes CPUs alone."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    with contextlib.ExitStack() as undo:
        undo.callback(dist.destroy_process_group)
        forget_masks()
        undo.callback(forget_masks)
        if device_type != "cpu":
            for attention in (RowAttention, TiledAttention):
                patch = unittest.mock.patch.object(attention, "__call__", _gpu_attention)
                undo.enter_context(patch)
        yield


def _gpu_attention(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash attention, in place of FlexAttention too: both keep the output and log-sum-exps.

    The operators are private: the public function would choose the CPU's, which keeps other things.
    If torch changes their arguments, every plan for GPUs fails.
    """
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if q.dtype == torch.bfloat16:
        out, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0)
    else:
        out, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0)
    return out


def _configure(config: RunConfig, processes: Processes, shortens: bool) -> _DryRun:
    """Build the objective, fake from where memory is given: a mesh reads its tensors' values."""
    mode, left_out = RecordingMode(), dict[str, int]()
    objective = build_sharded(
        config, processes, lambda built: left_out.update(shorten(built, shortens))
    )
    note_layers(objective, left_out, mode.enter)
    with mode:
        materialize(objective, config, processes)
        ema = EMA(objective, config.ema)
        moments = ensure_state(build_optimizer(objective, config.optim))
        # As when a run starts: then each unit has the storage that it is gathered into, empty.
        gather_each_once(objective)
    present: dict[tuple[str, int] | None, list[tuple[MemoryPart, Tensor]]] = {}

    def add(name: str, part: MemoryPart, tensor: Tensor) -> None:
        present.setdefault(layer_of(name, left_out), []).append((part, tensor))

    for name, parameter in objective.named_parameters():
        add(name, MemoryPart.WEIGHTS, parameter)
        for tensor in moments.get(parameter, {}).values():
            add(name, MemoryPart.OPTIMIZER, tensor)
    for name, buffer in objective.named_buffers():
        add(name, MemoryPart.WEIGHTS, buffer)
    for name, average in ema.tensors.items():
        add(name, MemoryPart.EMA, average)
    for tensor in _gathered(objective):
        add("", MemoryPart.GATHERED, tensor)
    return _DryRun(config, processes, objective, mode, present, left_out)


def _gathered(objective: nn.Module) -> list[Tensor]:
    """The tensors that FSDP2 gathers each parameter into.

    Private, because FSDP2 allocates them once and then resizes them, so no operator of the step
    gives them. If torch renames these attributes, every plan fails with an AttributeError; if it
    gathers into other tensors, gathered weights are counted as temporaries.
    """
    units = [module for module in objective.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    parameters = [parameter for group in groups for parameter in group.fsdp_params]
    return [tensor for parameter in parameters for tensor in parameter.all_gather_outputs]


def _record_step(run: _DryRun, rows: int) -> AllocationLog:
    """One forward and backward of a micro-batch of `rows`; no gradients are left behind."""
    # Each recording makes the masks, as a run's first step does.
    forget_masks()
    objective, log = run.objective, AllocationLog(run.config.vocab_size)
    for layer, tensors in run.present.items():
        if layer is not None:
            stack, number = layer
            log.enter((stack, "present"), number)
        for part, tensor in tensors:
            log.take(part, [tensor])
    with run.mode.recording_to(log):
        batch = _batch(rows, run.config.data.seq_len)
        counts = {name: count.float() for name, count in objective.counts(batch).items()}
        with computing(run.config, run.processes):
            # Of a cycle's phases the first trains most.
            terms = objective(batch, 0)
        loss = total_loss(terms, counts)
        log.take_rest(MemoryPart.ACTIVATIONS)
        loss.backward()
        gradients = {each: each.grad for each in objective.parameters() if each.grad is not None}
        log.take(MemoryPart.GRADIENTS, list(gradients.values()))
    for parameter in gradients:
        parameter.grad = None
    log.repeat_layers(run.left_out)
    return log


def _batch(rows: int, seq_len: int) -> Batch:
    whole = torch.zeros(rows, seq_len, dtype=torch.int64)
    index = torch.zeros(rows, dtype=torch.int64)
    return Batch(whole, whole.bool(), whole.clone(), index, index.clone())

"""How much memory a run needs on each device, and what fits there, before it is launched.

Bytes are of an optimizer step's highest moment, as a dry run of the step finds it (dry_run.py).
Kernels' own scratch space and an allocator's gaps come on top: on a CPU, glibc keeps up to two
thirds as much again of what was released, unless the environment has
MALLOC_MMAP_THRESHOLD_=65536. So does what happens beside steps: sample texts compute with a whole
copy of the weights.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from cola_train.config.run import RunConfig
from cola_train.config.settings import require
from cola_train.devices import cpu_bf16_is_fast
from cola_train.scaling.allocations import MemoryPart, Timeline
from cola_train.scaling.dry_run import record
from cola_train.training.parallel.blocks import Checkpointing

DeviceType = Literal["cpu", "cuda"]
# CUDA's context and kernels, NCCL's buffers and cuBLAS' workspaces: a round allowance, not measured
# for this project.
_RUNTIME: dict[DeviceType, int] = {"cuda": 2 * 10**9, "cpu": 0}
_NAMES = {
    MemoryPart.WEIGHTS: "weights",
    MemoryPart.GRADIENTS: "gradients",
    MemoryPart.OPTIMIZER: "optimizer state",
    MemoryPart.EMA: "moving average of the weights",
    MemoryPart.GATHERED: "gathered weights",
    MemoryPart.UNREDUCED: "gradients before reduction",
    MemoryPart.REDUCING: "gradients before reduction",
    MemoryPart.ACTIVATIONS: "activations",
    MemoryPart.LOGITS: "vocabulary logits",
    MemoryPart.TEMPORARIES: "temporaries",
}
_KINDS: tuple[Checkpointing, ...] = ("none", "selective", "full")
# A recording takes seconds, and a plan asks for the same one more than once.
_recorded: dict[str, dict[Checkpointing, Timeline]] = {}


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one device at the highest moment of a step."""

    by_part: dict[str, int]  # adds up to the peak
    peak: int


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to spread a run, and the largest micro-batch within a device's memory."""

    strategy: str
    activation_checkpointing: str
    micro_batch_size: int  # 0 if one row does not fit
    peak: int  # bytes with that micro-batch, or with one row


def estimate(
    config: RunConfig,
    world_size: int,
    local_world_size: int | None = None,
    device_type: DeviceType = "cpu",
) -> MemoryEstimate:
    """The memory of a step on each device, with the config's micro-batch and sharding.

    trainer.precision=auto is taken as bf16 on a GPU, and on a CPU as what this one would choose. Of
    the processes, one per device, `local_world_size` are on one machine (for hsdp), by default all.
    On "cuda", attention keeps what a GPU's kernels keep, an allowance for the runtime is added, and
    what parallel.cpu_offload moves to the host is left out. On "cpu" everything is the host's.

    Raises:
        UserError: a batch or strategy that does not fit the number of devices.
    """
    micro, local_rows = config.trainer.micro_batch_size, check_rows(config, world_size)
    kind = config.parallel.activation_checkpointing
    (recorded,) = _timelines(
        config, world_size, local_world_size or world_size, device_type, (kind,)
    )
    live = _of_step(recorded, micro, local_rows).at(micro)
    highest = live[live.sum(axis=1).argmax()]
    by_part = dict.fromkeys(_NAMES.values(), 0)
    for part, name in _NAMES.items():
        by_part[name] += int(highest[part])
    by_part["device runtime"] = _RUNTIME[device_type]
    return MemoryEstimate(by_part, sum(by_part.values()))


def what_fits(
    config: RunConfig,
    world_size: int,
    device_bytes: int,
    local_world_size: int | None = None,
    device_type: DeviceType = "cuda",
) -> list[Option]:
    """The largest micro-batch for each sharding, most sharded first, and activation checkpointing.

    A micro-batch divides a device's rows of a step, as training demands. Each kind of checkpointing
    is recorded once, with fsdp2; for other strategies the sharded parts scale as the shards do.
    That leaves out how shards are rounded up and that ddp gathers without a buffer, together some
    percent of a small model and less of a large one. Arguments and errors as `estimate`'s.
    """
    local_world_size = local_world_size or world_size
    local_rows = _local_rows(config, world_size)
    shard_sizes = {"fsdp2": world_size}
    if local_world_size < world_size and world_size % local_world_size == 0:
        shard_sizes["hsdp"] = config.parallel.shard_size or local_world_size
    if world_size > 1:
        shard_sizes["ddp"] = 1
    parallel = dataclasses.replace(config.parallel, strategy="fsdp2", shard_size=None)
    sharded = dataclasses.replace(config, parallel=parallel)
    recorded = _timelines(sharded, world_size, local_world_size, device_type, _KINDS)
    runtime, options = _RUNTIME[device_type], []
    for strategy, shard_size in shard_sizes.items():
        for kind, fsdp2 in zip(_KINDS, recorded, strict=True):
            timeline = fsdp2.resharded(world_size // shard_size)
            micro = _largest(timeline, local_rows, device_bytes - runtime)
            peak = _of_step(timeline, micro or 1, local_rows).peak(micro or 1)
            options.append(Option(strategy, kind, micro, peak + runtime))
    return options


def check_rows(config: RunConfig, world_size: int) -> int:
    """A device's rows of a step, which its micro-batches must divide.

    Raises:
        UserError: they do not.
    """
    micro, local_rows = config.trainer.micro_batch_size, _local_rows(config, world_size)
    require(
        local_rows % micro == 0,
        f"trainer.global_batch_size ({config.trainer.global_batch_size}) must be a multiple of "
        f"trainer.micro_batch_size x devices ({micro} x {world_size} = {micro * world_size}): "
        f"choose one that divides {local_rows}.",
    )
    return local_rows


def _local_rows(config: RunConfig, world_size: int) -> int:
    rows = config.trainer.global_batch_size
    require(
        rows % world_size == 0,
        f"trainer.global_batch_size ({rows}) must be a multiple of the number of devices "
        f"({world_size}).",
    )
    return rows // world_size


def _timelines(
    config: RunConfig,
    world_size: int,
    local_world_size: int,
    device_type: DeviceType,
    kinds: Sequence[Checkpointing],
) -> list[Timeline]:
    """The timeline of each kind of checkpointing, in place of the config's."""
    precision = config.trainer.precision
    if precision == "auto":
        precision = "bf16" if device_type == "cuda" or cpu_bf16_is_fast() else "fp32"
    # fp8 keeps no more than bf16, and its kernels cannot be recorded without its devices.
    if precision == "fp8":
        precision = "bf16"
    # A timeline does not depend on the micro-batch.
    config = dataclasses.replace(
        config,
        trainer=dataclasses.replace(config.trainer, precision=precision, micro_batch_size=1),
        parallel=dataclasses.replace(config.parallel, activation_checkpointing="none"),
    )
    known = _recorded.setdefault(repr((config, world_size, local_world_size, device_type)), {})
    if missing := [kind for kind in kinds if kind not in known]:
        recorded = record(config, world_size, local_world_size, device_type, missing)
        known.update(zip(missing, recorded, strict=True))
    offloaded = config.parallel.cpu_offload and device_type == "cuda"
    return [known[kind].resharded(0) if offloaded else known[kind] for kind in kinds]


def _of_step(timeline: Timeline, micro: int, local_rows: int) -> Timeline:
    return timeline if micro == local_rows else timeline.accumulating()


def _largest(timeline: Timeline, local_rows: int, device_bytes: int) -> int:
    """The largest divisor of `local_rows` that fits; all rows at once need no summed gradients."""
    if timeline.most_rows(device_bytes) >= local_rows:
        return local_rows
    most = timeline.accumulating().most_rows(device_bytes)
    divisors = (rows for rows in range(1, local_rows) if local_rows % rows == 0)
    return max((rows for rows in divisors if rows <= most), default=0)

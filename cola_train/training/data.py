"""Which rows each process gets at each step, whatever the numbers of processes and readers."""

import dataclasses
import signal
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from cola_train.config.data import DataConfig
from cola_train.config.settings import require
from cola_train.data.batch import Batch, PackedRows, ValidationRows
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData

_SECONDS_TO_OUTLAST = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBatchSampler(Sampler[list[int]]):
    """Endless: for each step from `start_step` on, the stream positions that a process trains on.

    Step s takes positions s * G to (s + 1) * G - 1, G being `global_batch_size`, cut into equal
    runs in process order.
    """

    global_batch_size: int  # rows of a step, divisible by world_size
    start_step: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        assert self.global_batch_size % self.world_size == 0
        assert 0 <= self.rank < self.world_size

    def __iter__(self) -> Iterator[list[int]]:
        size = self.global_batch_size // self.world_size
        first = self.start_step * self.global_batch_size + self.rank * size
        while True:
            yield list(range(first, first + size))
            first += self.global_batch_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationBatchSampler(Sampler[list[int]]):
    """Deals row numbers to processes in batches; every process gets as many batches.

    Numbers from `num_rows` on fill up the last round of batches.
    """

    num_rows: int
    batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size

    def __len__(self) -> int:
        """Batches of this process, the same for all."""
        return -(-self.num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(len(self)):
            first = (number * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


@dataclasses.dataclass
class RunData:
    """A prepared folder as training and validation batches of a run's processes.

    A training batch is all the rows of this process for one optimizer step; the loop cuts it into
    micro-batches. Not one of Lightning's data modules: data are opened, and refused, before
    Lightning is imported.

    Raises:
        UserError: no or damaged prepared data, or another seq_len than it was prepared with.
    """

    data: DataConfig
    _: dataclasses.KW_ONLY
    global_batch_size: int  # rows of one optimizer step, all processes together
    micro_batch_size: int  # rows of one forward pass on one process; of a validation batch too
    validation_rows: int | None  # at most so many, from the start of the split; None for all
    data_seed: int  # of the order of training rows
    start_step: int = 0  # counted from 0, of the first batch; set before training starts

    def __post_init__(self) -> None:
        self.prepared = PreparedData.open(self.data.path)
        self.prepared.check_run(self.data, tokenizer_sha256=None)
        readers, rows = self.data.num_workers, self.validation_rows
        require(
            self.micro_batch_size >= 1,
            f"micro_batch_size must be at least 1 row, not {self.micro_batch_size}.",
        )
        require(readers >= 0, f"data.num_workers must be at least 0, not {readers}.")
        require(
            rows is None or rows >= 0,
            f"validation_rows must be at least 0, or null for all rows, not {rows}.",
        )
        available = self.prepared.num_rows(VALIDATION)
        self.num_validation_rows = available if rows is None else min(rows, available)

    def train_loader(self, rank: int, world_size: int) -> DataLoader[Batch]:
        """Training batches of process `rank` of `world_size`, without end.

        Raises:
            UserError: `global_batch_size` is not a multiple of processes x `micro_batch_size`.
        """
        rows, unit = self.global_batch_size, world_size * self.micro_batch_size
        below = rows // unit * unit
        allowed = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        require(
            rows >= 1 and rows % unit == 0,
            f"global_batch_size must be a multiple of {unit} = {world_size} processes x "
            f"micro_batch_size {self.micro_batch_size}, not {rows}; nearest allowed: {allowed}.",
        )
        sampler = StepBatchSampler(
            global_batch_size=rows, start_step=self.start_step, rank=rank, world_size=world_size
        )
        packed = PackedRows(self.prepared, self.data_seed)
        return batch_loader(packed, sampler, self.data.num_workers)

    def validation_loader(self, rank: int, world_size: int) -> DataLoader[Batch]:
        """The validation batches of `rank`, the same each time, as many for every process."""
        sampler = ValidationBatchSampler(
            num_rows=self.num_validation_rows,
            batch_size=self.micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        # Read in this process: rows are few, and starting readers each time costs more.
        return batch_loader(ValidationRows(self.prepared, self.num_validation_rows), sampler, 0)


def batch_loader(
    rows: Dataset[Batch], sampler: Sampler[list[int]], num_workers: int
) -> DataLoader[Batch]:
    """Batches of the rows in `sampler`'s lists, read here or by `num_workers` other processes."""
    # With batch_size=None the dataset is asked for each of the sampler's lists in one call.
    return DataLoader(
        rows,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_outlast_signals,
        pin_memory=torch.cuda.is_available(),
    )


def _outlast_signals(worker: int) -> None:
    # A launcher's or scheduler's signal may go to every process; readers must outlast the step that
    # is then saved. SIGTERM is also how Python ends them, so it is heeded, but not at once.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SECONDS_TO_OUTLAST))

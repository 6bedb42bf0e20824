"""Batches for the training loop: which rows each process gets at each optimizer step, whatever the
processes and workers.
"""

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


class StepBatchSampler(Sampler[list[int]]):
    """Endless: for each optimizer step from `start_step` on, the stream positions that one process
    trains on.

    Step s takes positions s * G to (s + 1) * G - 1, G being `global_batch_size`, cut into equal
    runs in process order.
    """

    def __init__(
        self, *, global_batch_size: int, start_step: int, rank: int, world_size: int
    ) -> None:
        """`rank` of `world_size` processes; `global_batch_size` rows a step, divisible by
        `world_size`.
        """
        assert global_batch_size % world_size == 0
        assert 0 <= rank < world_size
        self._global_batch_size = global_batch_size
        self._start_step = start_step
        self._local_batch_size = global_batch_size // world_size
        self._offset = rank * self._local_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Positions of a step, step after step, without end."""
        first = self._start_step * self._global_batch_size + self._offset
        while True:
            yield list(range(first, first + self._local_batch_size))
            first += self._global_batch_size


class ValidationBatchSampler(Sampler[list[int]]):
    """Deals `num_rows` rows to processes in batches of `batch_size`; every process gets as many
    batches.

    Numbers from `num_rows` on fill up the last round of batches.
    """

    def __init__(self, *, num_rows: int, batch_size: int, rank: int, world_size: int) -> None:
        """`rank` of `world_size` processes."""
        assert 0 <= rank < world_size
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._num_batches = -(-num_rows // (batch_size * world_size))

    def __len__(self) -> int:
        """Batches of this process, the same for all."""
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        """Row numbers, batch after batch."""
        for number in range(self._num_batches):
            first = (number * self._world_size + self._rank) * self._batch_size
            yield list(range(first, first + self._batch_size))


class RunData:
    """A prepared folder as training and validation batches of a run's processes.

    A training batch is all the rows of this process for one optimizer step; the loop cuts it into
    micro-batches.
    The first batch is that of optimizer step `start_step`, to be set before training starts. Not
    one of Lightning's data modules: data are opened, and refused, before Lightning is imported.

    Attributes:
        start_step: optimizer steps that are done already.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        validation_rows: int | None,
        data_seed: int,
    ) -> None:
        """Open the data.

        Args:
            data: where it is and what the run expects of it.
            global_batch_size: rows of one optimizer step, all processes together.
            micro_batch_size: rows of one forward pass on one process; of a validation batch too.
            validation_rows: how many rows, from the start of the validation split, to validate on;
                None for all.
            data_seed: of the order of training rows.

        Raises:
            UserError: no or damaged prepared data, or another seq_len than it was prepared with.
        """
        self.start_step = 0
        self.prepared = PreparedData.open(data.path)
        self.prepared.check_run(data, tokenizer_sha256=None)
        require(
            micro_batch_size >= 1,
            f"micro_batch_size must be at least 1 row, not {micro_batch_size}.",
        )
        require(
            data.num_workers >= 0, f"data.num_workers must be at least 0, not {data.num_workers}."
        )
        require(
            validation_rows is None or validation_rows >= 0,
            f"validation_rows must be at least 0, or null for all rows, not {validation_rows}.",
        )
        self._num_workers = data.num_workers
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._data_seed = data_seed
        available = self.prepared.num_rows(VALIDATION)
        self.num_validation_rows = (
            available if validation_rows is None else min(validation_rows, available)
        )

    def train_loader(self, rank: int, world_size: int) -> DataLoader[Batch]:
        """Endless, of process `rank` of `world_size`; its first batch is that of optimizer step
        `start_step`.

        Raises:
            UserError: `global_batch_size` is not a multiple of processes x `micro_batch_size`.
        """
        unit = world_size * self._micro_batch_size
        below = self._global_batch_size // unit * unit
        allowed = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        require(
            self._global_batch_size >= 1 and self._global_batch_size % unit == 0,
            f"global_batch_size must be a multiple of {unit} = {world_size} processes x "
            f"micro_batch_size {self._micro_batch_size}, not {self._global_batch_size}; nearest "
            f"allowed: {allowed}.",
        )
        sampler = StepBatchSampler(
            global_batch_size=self._global_batch_size,
            start_step=self.start_step,
            rank=rank,
            world_size=world_size,
        )
        return batch_loader(PackedRows(self.prepared, self._data_seed), sampler, self._num_workers)

    def validation_loader(self, rank: int, world_size: int) -> DataLoader[Batch]:
        """The same rows each time, `micro_batch_size` a batch, as many batches for every process;
        those of `rank`.
        """
        sampler = ValidationBatchSampler(
            num_rows=self.num_validation_rows,
            batch_size=self._micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        # In this process: there are few, and starting others each time costs more than reading
        # them.
        return batch_loader(ValidationRows(self.prepared, self.num_validation_rows), sampler, 0)


def batch_loader(
    rows: Dataset[Batch], sampler: Sampler[list[int]], num_workers: int
) -> DataLoader[Batch]:
    """Batches of the rows that `sampler` names, one list a batch, read by this process or by
    `num_workers` others.
    """
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
    # A launcher's or scheduler's signal may go to every process; those that read must outlast the
    # step that is then saved. SIGTERM is also how Python ends them, so it is heeded, but not at
    # once.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SECONDS_TO_OUTLAST))

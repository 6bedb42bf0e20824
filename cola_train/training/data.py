"""Which rows each process gets at each step, whatever the numbers of processes and readers."""

import dataclasses
import hashlib
import itertools
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset

from cola_train.config.content import read_bytes
from cola_train.config.data import DataConfig
from cola_train.config.settings import at_least, require, require_each
from cola_train.console import say
from cola_train.data.batch import Batch, PackedRows, ValidationRows
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import MANIFEST_FILE, PreparedData
from cola_train.programs import signal_at_parents_end

_SECONDS_TO_OUTLAST = 20


def dealt(rounds: Iterable[int], size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """The batches of one process, where each round deals consecutive numbers, `size` to each.

    With G = `size` x `world_size`, round n has the numbers n G to (n + 1) G - 1, cut into equal
    runs in process order.
    """
    for number in rounds:
        first = (number * world_size + rank) * size
        yield list(range(first, first + size))


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
        manifest = read_bytes(self.prepared.folder / MANIFEST_FILE)
        self.sha256 = hashlib.sha256(manifest).hexdigest()  # the identity of the data
        self.prepared.check_run(self.data, tokenizer_sha256=None)
        require_each(self, "", at_least(1, " row"), "micro_batch_size")
        require_each(self, "", at_least(0, ", or null for all rows"), "validation_rows")
        available, most = self.prepared.num_rows(VALIDATION), self.validation_rows
        self.num_validation_rows = available if most is None else min(most, available)

    def train_loader(self, rank: int, world_size: int) -> DataLoader[Batch]:
        """Training batches of `rank`, without end; a UserError if their sizes do not divide."""
        rows, unit = self.global_batch_size, world_size * self.micro_batch_size
        below = rows // unit * unit
        allowed = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        require(
            rows >= 1 and rows % unit == 0,
            f"global_batch_size must be a multiple of {unit} = {world_size} processes x "
            f"micro_batch_size {self.micro_batch_size}, not {rows}; nearest allowed: {allowed}.",
        )
        num_rows = self.prepared.num_rows(TRAIN)
        if rank == 0 and num_rows < rows:
            say(
                f"The training split of {self.prepared.folder} has {num_rows:,} rows, fewer than a "
                f"batch of {rows:,} (trainer.global_batch_size): each batch repeats rows. Give "
                "more text, or a smaller batch."
            )
        steps = dealt(itertools.count(self.start_step), rows // world_size, rank, world_size)
        packed = PackedRows(self.prepared, self.data_seed)
        return batch_loader(packed, steps, self.data.num_workers)

    def validation_loader(self, rank: int, world_size: int) -> DataLoader[Batch]:
        """The validation batches of `rank`, the same each time, as many for every process."""
        rows, size = self.num_validation_rows, self.micro_batch_size
        # Numbers beyond the rows fill up the last round.
        rounds = dealt(range(-(-rows // (size * world_size))), size, rank, world_size)
        # Read in this process: rows are few, and starting readers each time costs more.
        return batch_loader(ValidationRows(self.prepared, rows), rounds, 0)


def batch_loader(
    rows: Dataset[Batch], lists: Iterable[list[int]], num_workers: int
) -> DataLoader[Batch]:
    """Batches of the rows in these lists, read here or by `num_workers` other processes."""
    # With batch_size=None the dataset is asked for each of the sampler's lists in one call.
    return _Loader(
        rows,
        sampler=lists,
        batch_size=None,
        num_workers=num_workers,
        worker_init_fn=_outlast_signals,
        pin_memory=torch.cuda.is_available(),
    )


class _Loader(DataLoader[Batch]):
    """Tells where rows are read that a reader has died.

    torch raises that in the main thread wherever it is: amid a save, say, which then counts as one
    that failed, and this process goes on to another collective than the others are in.
    """

    def __iter__(self) -> Any:
        before = signal.getsignal(signal.SIGCHLD)
        batches = super().__iter__()
        in_main = threading.current_thread() is threading.main_thread()
        if self.num_workers == 0 or not in_main:
            return batches
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return _watching_readers(batches)


def _watching_readers(batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        _error_if_any_worker_fails()
        before = signal.signal(signal.SIGCHLD, lambda *_: _error_if_any_worker_fails())
        try:
            batch = next(batches, None)
        finally:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        if batch is None:
            return
        yield batch


def _outlast_signals(worker: int) -> None:
    # A launcher's or scheduler's signal may go to every process; readers must outlast the step that
    # is then saved. SIGTERM is also how Python ends them, so it is heeded, but not at once.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SECONDS_TO_OUTLAST))
    # Without its parent it is of no use, and holds what it was forked with: the run's lock and
    # connections.
    signal_at_parents_end(signal.SIGKILL)

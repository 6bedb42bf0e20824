"""Readers: a death is told where rows are read, and nowhere else."""

import signal
import time
from pathlib import Path

import psutil
import pytest

from cola_train.data.batch import PackedRows
from cola_train.data.prepared import PreparedData
from cola_train.training.data import batch_loader


def readers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children()
        if process.status() != psutil.STATUS_ZOMBIE
        and process.cmdline() == psutil.Process().cmdline()
    ]


def test_a_reader_that_dies_is_told_of_where_rows_are_read(prepared_folder: Path) -> None:
    before, handler = readers(), signal.getsignal(signal.SIGCHLD)
    rows = PackedRows(PreparedData.open(prepared_folder), data_seed=1)
    lists = [[2 * number, 2 * number + 1] for number in range(50)]
    alone = list(batch_loader(rows, lists, 0))
    batches = iter(batch_loader(rows, lists, 1))
    for place in range(3):
        assert next(batches).tokens.equal(alone[place].tokens)
    (reader,) = [process for process in readers() if process not in before]
    reader.kill()
    # What the main thread does meanwhile is not interrupted.
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass
    assert signal.getsignal(signal.SIGCHLD) == handler
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid {reader.pid}\) is killed by"):
        for _ in batches:
            pass


def test_all_rows_come_and_then_an_end(prepared_folder: Path) -> None:
    rows = PackedRows(PreparedData.open(prepared_folder), data_seed=1)
    lists = [[number] for number in range(5)]
    found = [list(batch_loader(rows, lists, number)) for number in (0, 2)]
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        assert one.tokens.equal(other.tokens)

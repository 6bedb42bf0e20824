"""Which rows each process gets, against enumeration; with a real Trainer, resumed and not; with
reader processes and without.
"""

import itertools
import multiprocessing
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cola_train.config.data import CorpusConfig, DataConfig, PrepareConfig
from cola_train.config.settings import UserError
from cola_train.data.batch import (
    VALIDATION_SAMPLE_OFFSET,
    Batch,
    PackedRows,
    row_index,
    validation_batches,
)
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.training.data import RunData, dealt


def data_module(
    prepared: PreparedData,
    *,
    global_batch_size: int = 12,
    micro_batch_size: int = 2,
    validation_rows: int | None = None,
    num_workers: int = 0,
    step: int = 0,
) -> RunData:
    module = RunData(
        DataConfig(path=str(prepared.folder), seq_len=64, num_workers=num_workers),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        validation_rows=validation_rows,
        data_seed=5,
    )
    module.start_step = step
    return module


def assert_same(one: Batch, other: Batch) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def joined(batches: Iterable[Batch]) -> Batch:
    return Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))


# Training rows.


@given(
    world_size=st.integers(1, 8),
    local_batch_size=st.integers(1, 9),
    start_step=st.integers(0, 10**9),
)
def test_steps_are_consecutive_positions_whatever_the_processes(
    world_size: int, local_batch_size: int, start_step: int
) -> None:
    global_batch_size = world_size * local_batch_size
    ranks = [
        dealt(itertools.count(start_step), local_batch_size, rank, world_size)
        for rank in range(world_size)
    ]
    for step in range(start_step, start_step + 3):
        positions = [next(rank) for rank in ranks]
        assert {len(part) for part in positions} == {local_batch_size}
        expected = list(range(step * global_batch_size, (step + 1) * global_batch_size))
        assert [position for part in positions for position in part] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_is_the_same_rows_on_any_number_of_processes(
    prepared: PreparedData, world_size: int
) -> None:
    num_rows = prepared.num_rows("train")
    parts = [
        next(iter(data_module(prepared, step=100).train_loader(rank, world_size)))
        for rank in range(world_size)
    ]
    batch = joined(parts)
    assert batch.sample_index.tolist() == list(range(100 * 12, 101 * 12))
    assert num_rows < 100 * 12  # beyond the first epoch
    for place, position in enumerate(batch.sample_index.tolist()):
        tokens, document_ids = prepared.row("train", int(row_index(position, num_rows, 5)))
        assert batch.tokens[place].tolist() == tokens.tolist()
        assert batch.document_ids[place].tolist() == document_ids.tolist()


def test_an_epoch_of_batches_holds_every_row_once(prepared: PreparedData) -> None:
    num_rows = prepared.num_rows("train")
    rows = PackedRows(prepared, 5)[list(range(num_rows))]
    expected = [prepared.row("train", index)[0].tolist() for index in range(num_rows)]
    assert sorted(rows.tokens.tolist()) == sorted(expected)
    assert rows.tokens.tolist() != expected


def test_only_padding_carries_no_loss(prepared: PreparedData) -> None:
    batch = joined(islice(data_module(prepared).train_loader(0, 1), 10))
    assert batch.loss_mask.dtype == torch.bool
    assert [batch.tokens.dtype, batch.document_ids.dtype, batch.sample_index.dtype] == [
        torch.int64
    ] * 3
    assert 0 < int((~batch.loss_mask).sum()) < batch.tokens.numel() // 2
    assert torch.equal(batch.loss_mask, batch.tokens != prepared.manifest.pad_token_id)
    assert bool(batch.loss_mask[batch.tokens == prepared.manifest.eos_token_id].all())


@pytest.mark.parametrize("start_method, num_workers", [("fork", 2), ("spawn", 1)])
def test_reader_processes_change_nothing(
    prepared: PreparedData, start_method: str, num_workers: int
) -> None:
    alone = data_module(prepared, step=3).train_loader(0, 1)
    with_readers = data_module(prepared, step=3, num_workers=num_workers).train_loader(0, 1)
    with_readers.multiprocessing_context = multiprocessing.get_context(start_method)
    for one, other in zip(islice(alone, 5), islice(with_readers, 5), strict=True):
        assert_same(one, other)


# Validation rows.


@given(num_rows=st.integers(1, 100), batch_size=st.integers(1, 9), world_size=st.integers(1, 8))
def test_validation_rows_are_dealt_once_and_evenly(
    prepared: PreparedData, num_rows: int, batch_size: int, world_size: int
) -> None:
    module = data_module(prepared, micro_batch_size=batch_size)
    module.num_validation_rows = num_rows
    loaders = [module.validation_loader(rank, world_size) for rank in range(world_size)]
    lists: list[Any] = [list(loader.sampler) for loader in loaders]
    assert len({len(batches) for batches in lists}) == 1
    assert {len(batch) for batches in lists for batch in batches} == {batch_size}
    numbers = sorted(number for batches in lists for batch in batches for number in batch)
    assert numbers == list(range(len(numbers)))
    # no round that is all filling
    assert num_rows <= len(numbers) < num_rows + batch_size * world_size


@pytest.mark.parametrize(
    "validation_rows, world_size", [(None, 1), (None, 3), (7, 2), (1, 4), (10**6, 1)]
)
def test_validation_counts_each_row_once(
    prepared: PreparedData, validation_rows: int | None, world_size: int
) -> None:
    module = data_module(prepared, validation_rows=validation_rows, global_batch_size=24)
    parts = [list(module.validation_loader(rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in parts}) == 1
    batch = joined(batch for batches in parts for batch in batches)
    real = batch.loss_mask.any(dim=1)
    num_rows = min(validation_rows or 10**9, prepared.num_rows("validation"))
    assert module.num_validation_rows == num_rows
    rows = (batch.sample_index - VALIDATION_SAMPLE_OFFSET).tolist()
    assert sorted(row for row, counts in zip(rows, real.tolist(), strict=True) if counts) == list(
        range(num_rows)
    )
    assert int((~real).sum()) < 2 * world_size
    for place, row in enumerate(rows):
        assert batch.tokens[place].tolist() == prepared.row("validation", row)[0].tolist()


@pytest.mark.parametrize("num_rows", [1, 64, 100])
def test_validation_in_one_go_is_what_the_loader_gives(
    prepared: PreparedData, num_rows: int
) -> None:
    loader: Any = data_module(prepared, validation_rows=num_rows).validation_loader(0, 1)
    batch = joined(loader)
    kept = batch.loss_mask.any(dim=1)
    assert_same(
        joined(validation_batches(prepared, num_rows)), Batch(*(part[kept] for part in batch))
    )


def test_without_held_out_documents_there_are_no_validation_rows(
    prepared: PreparedData, tokenizer_file: Path, prose_file: Path, tmp_path: Path
) -> None:
    assert data_module(prepared, validation_rows=0).num_validation_rows == 0
    corpus = CorpusConfig(inputs=[str(prose_file)])
    none = prepare(
        PrepareConfig(
            out=str(tmp_path / "o"),
            tokenizer=str(tokenizer_file),
            seq_len=64,
            corpus=corpus,
            held_out_share=0.0,
        )
    )
    assert data_module(none).num_validation_rows == 0


# With Lightning.


class Recorder(pl.LightningModule):
    """Trains one number and writes down what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert isinstance(batch, Batch)
        self.trained.append(batch)
        return self.weight**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(prepared: PreparedData, max_steps: int, start_step: int = 0) -> list[Batch]:
    module = data_module(prepared, num_workers=1, step=start_step)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    recorder = Recorder()
    trainer.fit(recorder, train_dataloaders=module.train_loader(0, 1))
    return recorder.trained


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
def test_a_run_that_goes_on_sees_the_rows_of_an_uninterrupted_one(prepared: PreparedData) -> None:
    whole = train(prepared, 9)
    assert [batch.sample_index[0].item() for batch in whole] == list(range(0, 9 * 12, 12))
    for one, other in zip(
        whole, train(prepared, 5) + train(prepared, 4, start_step=5), strict=True
    ):
        assert_same(one, other)


def test_what_cannot_be_read_is_reported_with_its_sample(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(split: str, index: int) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(prepared, "row", fail)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        PackedRows(prepared, 5)[[7]]
    row = row_index(7, prepared.num_rows("train"), 5)
    assert caught.value.__notes__ == [
        f"while reading row {row} of the split 'train' of {prepared.folder}, sample 7"
    ]


# Bad settings.


def test_fewer_rows_than_a_batch_are_said_once(
    prepared: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    num_rows = prepared.num_rows("train")
    enough, more = num_rows // 2 * 2, num_rows // 2 * 2 + 2
    for rank in (0, 1):
        data_module(prepared, global_batch_size=enough, micro_batch_size=1).train_loader(rank, 2)
    assert capsys.readouterr().err == ""
    for rank in (0, 1):
        data_module(prepared, global_batch_size=more, micro_batch_size=1).train_loader(rank, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"has {num_rows:,} rows, fewer than a batch of {more:,} (trainer.global_batch_size)" in line
    )


@pytest.mark.parametrize(
    "global_batch_size, nearest", [(20, "18 or 24"), (5, "6"), (0, "6"), (-6, "6")]
)
def test_batches_that_do_not_divide(
    prepared: PreparedData, global_batch_size: int, nearest: str
) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"global_batch_size must be a multiple of 6 = 3 processes x micro_batch_size 2, not "
            rf"{global_batch_size}; "
            rf"nearest allowed: {nearest}\."
        ),
    ):
        data_module(prepared, global_batch_size=global_batch_size).train_loader(0, 3)


def test_other_bad_settings(prepared: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="micro_batch_size must be at least 1 row, not 0"):
        data_module(prepared, micro_batch_size=0)
    with pytest.raises(
        UserError, match="validation_rows must be at least 0, or null for all rows, not -1"
    ):
        data_module(prepared, validation_rows=-1)
    with pytest.raises(UserError, match=r"DataConfig\.num_workers must be at least 0"):
        data_module(prepared, num_workers=-1)
    for path, message in [
        (prepared.folder, r"has rows of 64 tokens, the run asks for 512"),
        (tmp_path, "is not prepared data"),
    ]:
        with pytest.raises(UserError, match=message):
            RunData(
                DataConfig(path=str(path)),
                global_batch_size=2,
                micro_batch_size=1,
                validation_rows=None,
                data_seed=0,
            )


def test_validation_samples_fit_in_64_bits() -> None:
    assert np.iinfo(np.int64).max - VALIDATION_SAMPLE_OFFSET > 10**12

"""Prepared rows as batches: by position in the training stream, or by row of validation."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset

from cola_train.data.order import row_index
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData

VALIDATION_SAMPLE_OFFSET = 1 << 62
"""Validation samples are numbered from here: they share no randomness with training samples."""

_Numbers = Int[np.ndarray, " batch"]


class Batch(NamedTuple):
    """Rows of packed documents."""

    tokens: Int[Tensor, "batch seq"]  # int64 ids
    # False at padding, and everywhere in rows that only fill a validation batch
    loss_mask: Bool[Tensor, "batch seq"]
    document_ids: Int[Tensor, "batch seq"]  # number of the token's document, from 0 in each row
    # global: stream position in training, VALIDATION_SAMPLE_OFFSET + row in validation
    sample_index: Int[Tensor, " batch"]
    row_index: Int[Tensor, " batch"]  # of the split, as read


class PackedRows(Dataset[Batch]):
    """Batches by lists of positions in the endless stream; `data_seed` shuffles each epoch anew."""

    def __init__(self, prepared: PreparedData, data_seed: int) -> None:
        self._prepared = prepared
        self._data_seed = data_seed

    def __getitem__(self, positions: list[int]) -> Batch:
        samples = np.array(positions, dtype=np.int64)
        rows = row_index(samples, self._prepared.num_rows(TRAIN), self._data_seed)
        return _read(self._prepared, TRAIN, rows, samples, real=np.ones(len(rows), dtype=np.bool_))


class ValidationRows(Dataset[Batch]):
    """Batches by lists of row numbers; from `num_rows` on, copies without loss that only fill."""

    def __init__(self, prepared: PreparedData, num_rows: int) -> None:
        self._prepared = prepared
        self._num_rows = num_rows

    def __getitem__(self, indices: list[int]) -> Batch:
        numbers = np.array(indices, dtype=np.int64)
        rows = numbers % self._num_rows
        samples, real = VALIDATION_SAMPLE_OFFSET + rows, numbers < self._num_rows
        return _read(self._prepared, VALIDATION, rows, samples, real=real)


def validation_batches(
    prepared: PreparedData, num_rows: int, batch_size: int = 64
) -> Iterator[Batch]:
    """The first `num_rows` validation rows in one process, as a run's validation sees them."""
    rows = ValidationRows(prepared, num_rows)
    for first in range(0, num_rows, batch_size):
        yield rows[list(range(first, min(first + batch_size, num_rows)))]


def _read(
    prepared: PreparedData,
    split: str,
    rows: _Numbers,
    samples: _Numbers,
    *,
    real: Bool[np.ndarray, " batch"],
) -> Batch:
    read = []
    for row, sample in zip(rows.tolist(), samples.tolist(), strict=True):
        try:
            read.append(prepared.row(split, row))
        except Exception as error:  # whatever it is, it is reported with the sample
            place = f"row {row} of the split '{split}' of {prepared.folder}, sample {sample}"
            error.add_note(f"while reading {place}")
            raise
    tokens, document_ids = (np.stack(arrays) for arrays in zip(*read, strict=True))
    loss_mask = (tokens != prepared.manifest.pad_token_id) & real[:, None]
    return Batch(
        *(torch.from_numpy(array) for array in (tokens, loss_mask, document_ids, samples, rows))
    )

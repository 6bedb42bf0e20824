"""Prepared rows as batches: by position in the training stream, or by row of validation.

Each epoch is a keyed permutation of the training rows, computed per position: there is no table.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt64
from torch import Tensor
from torch.utils.data import Dataset

from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData

VALIDATION_SAMPLE_OFFSET = 1 << 62
"""Validation samples are numbered from here: they share no randomness with training samples."""

_Numbers = Int[np.ndarray, " batch"]
_Flags = Bool[np.ndarray, " batch"]
_Words = UInt64[np.ndarray, " n"]
_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive multiples are far apart


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
        self._prepared, self._data_seed = prepared, data_seed

    def __getitem__(self, positions: list[int]) -> Batch:
        samples = np.array(positions, dtype=np.int64)
        rows = row_index(samples, self._prepared.num_rows(TRAIN), self._data_seed)
        return _read(self._prepared, TRAIN, rows, samples, np.ones(len(rows), dtype=np.bool_))


class ValidationRows(Dataset[Batch]):
    """Batches by lists of row numbers; from `num_rows` on, copies without loss that only fill."""

    def __init__(self, prepared: PreparedData, num_rows: int) -> None:
        self._prepared, self._num_rows = prepared, num_rows

    def __getitem__(self, indices: list[int]) -> Batch:
        numbers = np.array(indices, dtype=np.int64)
        rows = numbers % self._num_rows
        samples, real = VALIDATION_SAMPLE_OFFSET + rows, numbers < self._num_rows
        return _read(self._prepared, VALIDATION, rows, samples, real)


def validation_batches(
    prepared: PreparedData, num_rows: int, batch_size: int = 64
) -> Iterator[Batch]:
    """The first `num_rows` validation rows in one process, as a run's validation sees them."""
    rows = ValidationRows(prepared, num_rows)
    for first in range(0, num_rows, batch_size):
        yield rows[list(range(first, min(first + batch_size, num_rows)))]


def training_batches(
    prepared: PreparedData, rows: Sequence[int], batch_size: int = 64
) -> Iterator[Batch]:
    """Training rows by their numbers, each its own sample: for statistics, not for training."""
    for first in range(0, len(rows), batch_size):
        numbers = np.array(rows[first : first + batch_size], dtype=np.int64)
        real = np.ones(len(numbers), dtype=np.bool_)
        yield _read(prepared, TRAIN, numbers, numbers, real)


def _read(
    prepared: PreparedData, split: str, rows: _Numbers, samples: _Numbers, real: _Flags
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


def row_index(position: int | np.ndarray, num_rows: int, data_seed: int) -> np.ndarray:
    """The row at each position of the endless stream of training rows, in an array of its shape.

    Positions `e * num_rows` to `(e + 1) * num_rows - 1` are epoch `e` and hold every row once, in
    an order of that epoch's own. Time and memory do not depend on `num_rows`.

    Positions count from 0; `data_seed` is any integer, and equal modulo 2^64 is equal.

    Raises:
        ValueError: a negative position, or no rows.
    """
    positions = np.asarray(position, dtype=np.int64)
    if num_rows < 1 or (positions.size and positions.min() < 0):
        raise ValueError(
            f"row_index needs num_rows >= 1 and position >= 0, not {num_rows} and {position}"
        )
    epoch, index = np.divmod(positions.ravel(), num_rows)
    rows = _permute(index.astype(np.uint64), epoch.astype(np.uint64), num_rows, data_seed)
    return rows.astype(np.int64).reshape(positions.shape)


def _permute(index: _Words, epoch: _Words, num_rows: int, data_seed: int) -> _Words:
    # A Feistel network permutes the numbers of 2 x half_bits bits. Applying it again to whatever
    # falls outside [0, num_rows) ("cycle walking") permutes [0, num_rows): following a cycle of a
    # permutation from inside, one comes back inside.
    # At least 3 bits a half: networks of fewer bits favor some orders of a handful of rows
    # measurably.
    half_bits = max(3, ((num_rows - 1).bit_length() + 1) // 2)
    # Arrays throughout: unsigned arrays wrap silently, unsigned scalars warn of it.
    seed = _mix(np.full(1, data_seed % (1 << 64), dtype=np.uint64))
    key = _mix(seed + (epoch + np.uint64(1)) * np.uint64(_GOLDEN))
    result = _feistel(index, key, half_bits)
    outside = np.flatnonzero(result >= num_rows)
    while outside.size:
        result[outside] = _feistel(result[outside], key[outside], half_bits)
        outside = outside[result[outside] >= num_rows]
    return result


def _feistel(value: _Words, key: _Words, half_bits: int) -> _Words:
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = value >> bits, value & mask
    for number in range(1, _NUM_ROUNDS + 1):
        round_key = key + np.uint64(number * _GOLDEN % (1 << 64))
        left, right = right, left ^ (_mix(_mix(round_key) + right) & mask)
    return (left << bits) | right


def _mix(value: _Words) -> _Words:
    """SplitMix64's finalizer: a 64-bit bijection; every input bit moves every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: _Words = value ^ (value >> np.uint64(31))
    return mixed

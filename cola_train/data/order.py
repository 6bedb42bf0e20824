"""The order of training rows: each epoch a keyed permutation, computed per position, no table."""

import numpy as np
from jaxtyping import UInt64

_Words = UInt64[np.ndarray, " n"]
_NUM_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: consecutive multiples are far apart


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

"""Rows cut into tiles: queries, and the keys that any of them sees; other pairs are left out."""

import dataclasses
import math

# Positions. Smaller tiles leave out more pairs and make more calls; on a CPU 64 to 128 measured
# best, and 128 is FlexAttention's.
TILE = 128
Span = tuple[int, int]  # first position, and the one after the last


@dataclasses.dataclass(frozen=True)
class Tile:
    """Queries, and the keys that any of them sees, in one or two spans."""

    queries: Span
    keys: tuple[Span, ...]

    @property
    def pairs(self) -> int:
        """Computed pairs of a query and a key, per row."""
        return (self.queries[1] - self.queries[0]) * sum(end - start for start, end in self.keys)


def row_tiles(num_positions: int, block_size: int) -> list[Tile]:
    """Tiles of a row of clean positions, each of which sees its own block and earlier ones."""
    return [Tile((start, end), ((0, end),)) for start, end in _spans(num_positions, block_size)]


def packed_tiles(num_latents: int, block_size: int, copies: int = 1) -> list[Tile]:
    """Tiles of a training row (`masks.packed_layout`).

    Noised positions attend over their own span and the earlier clean blocks; clean ones follow.
    """
    first_clean, num_clean = copies * num_latents, num_latents - block_size
    tiles = []
    for offset in range(0, first_clean, num_latents):
        for start, end in _spans(num_latents, block_size):
            history = (first_clean, first_clean + end - block_size)
            own = (offset + start, offset + end)
            tiles.append(Tile(own, (own, history) if history[1] > history[0] else (own,)))
    for start, end in _spans(num_clean, block_size):
        own = (first_clean + start, first_clean + end)
        tiles.append(Tile(own, ((first_clean, own[1]),)))
    return tiles


def _spans(length: int, block_size: int) -> list[Span]:
    step = math.ceil(TILE / block_size) * block_size
    return [(start, min(start + step, length)) for start in range(0, length, step)]

"""Passes over a cache, block by block and rows of different lengths, against one packed pass."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train.models.attention.cached import CachedAttention, KVCache
from cola_train.models.attention.masks import clean_layout, visible_set_mask
from cola_train.models.attention.rows import RowAttention
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.models.text_vae import TextVAE
from tests.helpers.compare import assert_near, largest_difference
from tests.helpers.tiny import random_latents, tiny_dit, tiny_vae

BLOCK_SIZE = 4
HISTORY_BLOCKS = [1, 3, 0]  # committed before the passes that are compared, by row
NUM_BLOCKS = 5
ROWS = len(HISTORY_BLOCKS)


def inside(length: int, block_size: int) -> Tensor:
    places = clean_layout(length, block_size)
    return visible_set_mask(places, places)[0]


def dit_pass(
    dit: BlockCausalDiT, cache: KVCache, latents: Tensor, t: Tensor, unconditional: bool = False
) -> Tensor:
    """One pass over the cache at time `t` (one per row)."""
    attention = CachedAttention(cache, inside(latents.shape[1], BLOCK_SIZE))
    positions, index = attention.slots, torch.arange(ROWS)[:, None].expand(latents.shape[:2])
    if unconditional:
        latents, positions, index = (torch.cat([x, x]) for x in (latents, positions, index))
    return dit(latents, Times(t, index), positions, attention).detach()


def block_of_each_row(x: Tensor, blocks: list[int]) -> Tensor:
    """Row r's block `blocks[r]`."""
    return torch.stack(
        [
            row[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
            for row, block in zip(x, blocks, strict=True)
        ]
    )


@pytest.fixture
def dit() -> BlockCausalDiT:
    return tiny_dit()


@pytest.fixture
def clean() -> Tensor:
    return random_latents(ROWS, NUM_BLOCKS * BLOCK_SIZE, 4, seed=50)


@pytest.fixture
def noised() -> Tensor:
    return random_latents(ROWS, NUM_BLOCKS * BLOCK_SIZE, 4, seed=51)


def committed_cache(dit: BlockCausalDiT, clean: Tensor) -> KVCache:
    """Each row's history, all rows in one pass."""
    cache = dit.new_cache(ROWS, NUM_BLOCKS * BLOCK_SIZE)
    dit_pass(dit, cache, clean[:, : max(HISTORY_BLOCKS) * BLOCK_SIZE], torch.zeros(ROWS))
    cache.commit([blocks * BLOCK_SIZE for blocks in HISTORY_BLOCKS])
    assert cache.lengths == [4, 12, 0]
    return cache


def test_dit_blocks_over_a_cache_equal_the_packed_pass(
    dit: BlockCausalDiT, clean: Tensor, noised: Tensor
) -> None:
    cache = committed_cache(dit, clean)
    for added in range(2):
        blocks = [blocks + added for blocks in HISTORY_BLOCKS]
        t = torch.tensor([0.9, 0.2, 0.5]) + 0.05 * added
        z = block_of_each_row(noised, blocks)
        # What is written but not committed leaves no trace.
        first = dit_pass(dit, cache, z, t)
        dit_pass(dit, cache, 10 * z, t.flip(0))
        again = dit_pass(dit, cache, z, t)
        assert torch.equal(first, again)

        times = Times(
            torch.cat([t, torch.zeros(1)]), torch.arange(ROWS)[:, None].expand(clean.shape[:2])
        )
        packed = dit.velocity(noised, clean, times)
        assert_near(again, block_of_each_row(packed, blocks))

        dit_pass(dit, cache, block_of_each_row(clean, blocks), torch.zeros(ROWS))
        cache.commit([BLOCK_SIZE] * ROWS)


def test_uncommitted_passes_leave_committed_keys_alone(
    dit: BlockCausalDiT, clean: Tensor, noised: Tensor
) -> None:
    cache = committed_cache(dit, clean)
    kept = [
        (cache.keys[:, row, :length].clone(), cache.values[:, row, :length].clone())
        for row, length in enumerate(cache.lengths)
    ]
    dit_pass(dit, cache, block_of_each_row(noised, HISTORY_BLOCKS), torch.full((ROWS,), 0.7))
    assert cache.lengths == [4, 12, 0]
    for row, (keys, values) in enumerate(kept):
        assert torch.equal(cache.keys[:, row, : cache.lengths[row]], keys)
        assert torch.equal(cache.values[:, row, : cache.lengths[row]], values)


def test_history_in_parts_equals_history_at_once(
    dit: BlockCausalDiT, clean: Tensor, noised: Tensor
) -> None:
    at_once, in_parts = dit.new_cache(ROWS, 16), dit.new_cache(ROWS, 16)
    dit_pass(dit, at_once, clean[:, :12], torch.zeros(ROWS))
    at_once.commit([12] * ROWS)
    for block in range(3):
        dit_pass(dit, in_parts, clean[:, 4 * block : 4 * block + 4], torch.zeros(ROWS))
        in_parts.commit([4] * ROWS)
    t = torch.full((ROWS,), 0.6)
    assert_near(
        dit_pass(dit, at_once, noised[:, 12:16], t), dit_pass(dit, in_parts, noised[:, 12:16], t)
    )


def test_unconditional_rows_equal_the_block_alone(
    dit: BlockCausalDiT, clean: Tensor, noised: Tensor
) -> None:
    cache = committed_cache(dit, clean)
    z, t = block_of_each_row(noised, HISTORY_BLOCKS), torch.tensor([0.9, 0.2, 0.5])
    conditional, unconditional = dit_pass(dit, cache, z, t, unconditional=True).chunk(2)
    assert_near(conditional, dit_pass(dit, cache, z, t), 1e-6)
    times = Times(torch.cat([t, torch.zeros(1)]), torch.arange(ROWS)[:, None].expand(z.shape[:2]))
    # Positions count from 0 there, from each row's history here.
    assert_near(unconditional, dit.velocity(z, z, times))
    assert largest_difference(conditional[:2], unconditional[:2]) > 1e-2
    assert_near(conditional[2], unconditional[2])


def decoder_pass(vae: TextVAE, cache: KVCache, latents: Tensor) -> Tensor:
    attention = CachedAttention(cache, inside(latents.shape[1], vae.config.block_size))
    return vae.decoder.head(
        vae.decoder(latents, positions=attention.slots, attention=attention)
    ).detach()


@pytest.mark.parametrize(("vae_block_size", "patch_size"), [(1, 1), (2, 1), (4, 1), (1, 2)])
def test_decoder_blocks_over_a_cache_equal_one_pass(
    clean: Tensor, vae_block_size: int, patch_size: int
) -> None:
    vae = tiny_vae(block_size=vae_block_size, patch_size=patch_size)
    whole = vae.decode(clean).unflatten(1, (-1, patch_size))  # (rows, latents, patch, vocab)
    cache = vae.new_cache(ROWS, NUM_BLOCKS * BLOCK_SIZE)
    decoder_pass(vae, cache, clean[:, : max(HISTORY_BLOCKS) * BLOCK_SIZE])
    cache.commit([blocks * BLOCK_SIZE for blocks in HISTORY_BLOCKS])
    for added in range(2):
        blocks = [blocks + added for blocks in HISTORY_BLOCKS]
        z = block_of_each_row(clean, blocks)
        decoder_pass(vae, cache, z + 1)
        logits = decoder_pass(vae, cache, z)
        assert_near(logits.unflatten(1, (-1, patch_size)), block_of_each_row(whole, blocks))
        cache.commit([BLOCK_SIZE] * ROWS)


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    seq=st.integers(1, 4),
    alone=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_each_query_attends_over_its_rows_history_and_what_it_may_see_inside(
    lengths: list[int], seq: int, alone: bool, seed: int
) -> None:
    """One layer's attention against one query at a time, under any mask that lets a position see
    itself.
    """
    rows, heads, head_dim = len(lengths), 2, 4
    history = random_latents(2, rows, heads, max(lengths), head_dim, seed=seed)
    q, k, v = random_latents(3, rows * (2 if alone else 1), heads, seq, head_dim, seed=seed + 1)
    inside_mask = (random_latents(seq, seq, seed=seed + 2) > 0) | torch.eye(seq, dtype=torch.bool)
    cache = KVCache(1, rows, max(lengths) + seq, heads, head_dim, like=history)
    if max(lengths):
        everything = CachedAttention(
            cache, torch.ones(max(lengths), max(lengths), dtype=torch.bool)
        )
        everything.layer(0)(history[0], history[0], history[1])
        cache.commit(lengths)
    out = CachedAttention(cache, inside_mask).layer(0)(q, k, v)
    for row in range(len(q)):
        kept = lengths[row] if row < rows else 0
        for head in range(heads):
            for place in range(seq):
                seen = inside_mask[place].nonzero().flatten()
                keys = torch.cat([history[0, row % rows, head, :kept], k[row, head, seen]])
                values = torch.cat([history[1, row % rows, head, :kept], v[row, head, seen]])
                shares = (keys @ q[row, head, place] / head_dim**0.5).softmax(0)
                assert_near(out[row, head, place], shares @ values)


@pytest.mark.parametrize("causal", [True, False])
def test_a_row_without_a_mask_is_causal_or_all_visible(causal: bool) -> None:
    q, k, v = random_latents(3, 2, 2, 5, 4, seed=60)
    out = RowAttention(None, causal)(q, k, v)
    for place in range(5):
        seen = place + 1 if causal else 5
        shares = (q[:, :, place : place + 1] @ k[:, :, :seen].transpose(2, 3) / 2).softmax(-1)
        assert_near(out[:, :, place : place + 1], shares @ v[:, :, :seen])


def test_a_full_cache_is_refused(dit: BlockCausalDiT, clean: Tensor) -> None:
    cache = dit.new_cache(ROWS, 6)
    dit_pass(dit, cache, clean[:, :4], torch.zeros(ROWS))
    cache.commit([0, 4, 0])
    with pytest.raises(AssertionError, match="cache of 6 positions, 8 needed"):
        CachedAttention(cache, inside(4, BLOCK_SIZE))

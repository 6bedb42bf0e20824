"""Attention by tiles, and FlexAttention's masks, against every pair under the one predicate."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

import cola_train.models.attention.tiles
from cola_train.models.attention.masks import (
    TokenLayout,
    clean_layout,
    packed_layout,
    visible_set_mask,
)
from cola_train.models.attention.rows import Attention
from cola_train.models.attention.tiled import (
    TiledAttention,
    block_mask,
    packed_attention,
    row_attention,
)
from cola_train.models.attention.tiles import packed_tiles, row_tiles
from cola_train.models.modulation import Times
from tests.helpers.compare import assert_near, every_pair, largest_difference
from tests.helpers.tiny import random_latents, tiny_dit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several a row, at the sizes here."""
    monkeypatch.setattr(cola_train.models.attention.tiles, "TILE", 8)


def relative(actual: Tensor, expected: Tensor) -> float:
    # One key alone leaves queries without a gradient.
    return float((actual - expected).float().norm() / expected.float().norm().clamp(min=0.1))


def run(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of queries, keys and values."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention.layer(0)(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_same(actual: list[Tensor], expected: list[Tensor], of_gradients: float = 1e-4) -> None:
    assert_near(actual[0], expected[0], 1e-5)
    for one, other in zip(actual[1:], expected[1:], strict=True):
        assert relative(one, other) < of_gradients


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, int, int, Tensor | None, Tensor | None]:
    """Latents, block size, copies; documents and hidden histories by block, or none."""
    size, blocks, copies, rows = (
        draw(st.integers(1, 9)),
        draw(st.integers(1, 6)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
    )
    document = shown = None
    if draw(st.booleans()):
        starts = torch.tensor(
            draw(
                st.lists(
                    st.lists(st.integers(0, 1), min_size=blocks, max_size=blocks),
                    min_size=rows,
                    max_size=rows,
                )
            )
        )
        document = starts.cumsum(1).repeat_interleave(size, dim=1)
    if draw(st.booleans()):
        flags = st.lists(st.booleans(), min_size=copies * blocks, max_size=copies * blocks)
        shown = torch.tensor(draw(st.lists(flags, min_size=rows, max_size=rows))).repeat_interleave(
            size, dim=1
        )
    return size * blocks, size, copies, document, shown


@settings(max_examples=60)
@given(row=packed_rows(), seed=st.integers(0, 99))
def test_packed_rows_equal_every_pair_under_the_mask(
    row: tuple[int, int, int, Tensor | None, Tensor | None], seed: int
) -> None:
    latents, size, copies, document, shown = row
    rows = next((len(x) for x in (document, shown) if x is not None), 2)
    places = packed_layout(latents, size, document, shown, copies=copies)
    seq = places.block.shape[1]
    assert seq == (copies + 1) * latents - size
    q, k, v, grad = torch.randn(4, rows, 2, seq, 8, generator=torch.Generator().manual_seed(seed))
    fast, plain = (
        packed_attention(latents, size, document, shown, CPU, copies),
        every_pair(places),
    )
    assert isinstance(fast, TiledAttention)
    assert_same(run(fast, (q, k, v), grad), run(plain, (q, k, v), grad))
    # The last layer asks for the noised positions alone.
    few = copies * latents
    first = (q[:, :, :few], k, v)
    assert_same(run(fast, first, grad[:, :, :few]), run(plain, first, grad[:, :, :few]))


@settings(max_examples=30)
@given(
    size=st.integers(1, 9),
    blocks=st.integers(1, 6),
    documents=st.booleans(),
    seed=st.integers(0, 99),
)
def test_clean_rows_equal_every_pair_under_the_mask(
    size: int, blocks: int, documents: bool, seed: int
) -> None:
    seq = size * blocks
    generator = torch.Generator().manual_seed(seed)
    document = (
        torch.randint(0, 2, (2, blocks), generator=generator)
        .cumsum(1)
        .repeat_interleave(size, dim=1)
        if documents
        else None
    )
    q, k, v, grad = torch.randn(4, 2, 2, seq, 8, generator=generator)
    plain = every_pair(clean_layout(seq, size, document))
    assert_same(
        run(row_attention(seq, size, document, CPU), (q, k, v), grad), run(plain, (q, k, v), grad)
    )


@settings(max_examples=60)
@given(size=st.integers(1, 20), blocks=st.integers(1, 8), copies=st.integers(1, 3))
def test_tiles_hold_every_visible_pair_once_and_leave_most_others_out(
    size: int, blocks: int, copies: int
) -> None:
    latents = size * blocks
    for row, places in (
        (packed_tiles(latents, size, copies), packed_layout(latents, size, copies=copies)),
        (row_tiles(latents, size), clean_layout(latents, size)),
    ):
        computed = torch.zeros(places.block.shape[1], places.block.shape[1], dtype=torch.int64)
        for tile in row:
            for start, end in tile.keys:
                computed[slice(*tile.queries), start:end] += 1
        assert int(computed.max()) == 1
        assert bool((computed.bool() | ~visible_set_mask(places, places)[0]).all())
        assert int(computed.sum()) == sum(tile.pairs for tile in row)


def test_under_two_fifths_of_the_pairs_are_computed_at_the_papers_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cola_train.models.attention.tiles, "TILE", 128)
    computed = sum(tile.pairs for tile in packed_tiles(512, 16))
    # Four tiles over 1 to 4 tiles of history, less what the last block would be, twice; and the
    # noised ones over themselves.
    assert computed == 128 * (4 * 128 + (112 + 240 + 368 + 496) + (128 + 256 + 384)) + 112 * 496
    assert 0.36 < computed / (2 * 512 - 16) ** 2 < 0.38


def test_bf16_is_within_a_hundredth() -> None:
    places = packed_layout(32, 4)
    q, k, v, grad = torch.randn(
        4, 2, 2, places.block.shape[1], 16, generator=torch.Generator().manual_seed(1)
    )
    expected = run(every_pair(places), (q, k, v), grad)
    half = run(
        packed_attention(32, 4, None, None, CPU),
        (q.bfloat16(), k.bfloat16(), v.bfloat16()),
        grad.bfloat16(),
    )
    assert [x.dtype for x in half] == [torch.bfloat16] * 4
    assert max(relative(one, other) for one, other in zip(half, expected, strict=True)) < 1e-2


@pytest.mark.parametrize("apart", [False, True])
def test_flex_attentions_mask_is_the_predicate(
    apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU FlexAttention computes every pair, under the mask that a GPU skips by."""
    monkeypatch.setattr(
        torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True
    )
    document = (
        torch.tensor([[0, 0, 1, 1], [0, 1, 1, 2]]).repeat_interleave(5, dim=1) if apart else None
    )
    shown = (
        torch.tensor([[True, False] * 4, [True] * 8]).repeat_interleave(5, dim=1) if apart else None
    )
    places = packed_layout(20, 5, document, shown, copies=2)
    q, k, v = torch.randn(
        3, 2, 1, places.block.shape[1], 16, generator=torch.Generator().manual_seed(7)
    )
    for queries in (places.block.shape[1], 40):
        out = flex_attention(q[:, :, :queries], k, v, block_mask=block_mask(places, queries))
        assert isinstance(out, Tensor)
        assert_near(out, every_pair(places)(q[:, :, :queries], k, v), 1e-5)


def test_copies_do_not_see_each_other() -> None:
    """K copies in one pass give what K passes give; masks of static rows are made once."""
    dit, history = tiny_dit(), random_latents(2, 16, 4, seed=3)
    z_t = random_latents(2, 48, 4, seed=4)
    t = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.1, 0.4, 0.0])
    index = torch.arange(6).view(2, 3).repeat_interleave(16, dim=1)
    together = dit.velocity(z_t, history, Times(t, index))
    for copy in range(3):
        at = slice(16 * copy, 16 * (copy + 1))
        assert_near(dit.velocity(z_t[:, at], history, Times(t, index[:, at])), together[:, at])
    assert largest_difference(together[:, :16], together[:, 16:32]) > 1e-3
    assert packed_attention(16, 4, None, None, CPU, 3) is packed_attention(
        16, 4, None, None, CPU, 3
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_the_whole_fast_pass_equals_the_plain_one(dtype: torch.dtype, tolerance: float) -> None:
    """Tiles and a last layer at noised positions alone, against every pair and position: velocities
    and gradients.
    """
    dit = tiny_dit(num_layers=3)
    z_t, history = (
        random_latents(2, 32, 4, seed=5).requires_grad_(),
        random_latents(2, 16, 4, seed=6),
    )
    index = torch.arange(4).view(2, 2).repeat_interleave(16, dim=1)
    times = Times(torch.tensor([0.9, 0.2, 0.5, 0.7, 0.0]), index)
    grad = random_latents(2, 32, 4, seed=8)

    def plain() -> Tensor:
        positions = torch.arange(16)[None]
        whole = Times(times.distinct, torch.cat([index, torch.full((2, 12), 4)], dim=1))
        attention = every_pair(packed_layout(16, 4, copies=2))
        latents = torch.cat([z_t, history[:, :12]], dim=1)
        return dit(
            latents, whole, torch.cat([positions, positions, positions[:, :12]], dim=1), attention
        )[:, :32]

    def with_gradients(velocity: Callable[[], Tensor]) -> list[Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            out = velocity()
        return [out.detach(), *torch.autograd.grad(out, [z_t, *dit.parameters()], grad)]

    fast, expected = (
        with_gradients(lambda: dit.velocity(z_t, history, times)),
        with_gradients(plain),
    )
    assert relative(fast[0], expected[0]) < tolerance / 10
    assert (
        relative(*(torch.cat([x.flatten() for x in found[1:]]) for found in (fast, expected)))
        < tolerance
    )
    if dtype == torch.bfloat16:
        return
    names = ["z_t", *(name for name, _ in dit.named_parameters())]
    for name, one, other in zip(names, fast[1:], expected[1:], strict=True):
        # A key's bias has no gradient but rounding: softmax does not see what all keys share.
        assert name.endswith("norm_k.bias") or relative(one, other) < tolerance, name


def test_masks_first_made_without_gradients_serve_with_them() -> None:
    with torch.inference_mode():
        packed_attention(20, 4, None, None, CPU)
    q, k, v, grad = torch.randn(4, 1, 1, 36, 8, generator=torch.Generator().manual_seed(2))
    plain = every_pair(packed_layout(20, 4))
    assert_same(
        run(packed_attention(20, 4, None, None, CPU), (q, k, v), grad), run(plain, (q, k, v), grad)
    )


def test_places_of_parts_keep_their_fields() -> None:
    places = TokenLayout(
        torch.arange(4)[None],
        torch.zeros(1, 4, dtype=torch.int64),
        None,
        torch.ones(1, 4, dtype=torch.bool),
    )
    part = places.map(lambda x: x[:, 1:3])
    assert part.block.tolist() == [[1, 2]]
    assert part.document is None
    assert part.sees_history is not None
    assert part.sees_history.shape == (1, 2)

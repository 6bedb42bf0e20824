"""The visible set against enumeration of its rules, and against what perturbing one position
changes.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train.models.attention.masks import (
    clean_layout,
    document_positions,
    packed_layout,
    visible_set_mask,
)
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from tests.helpers import naive
from tests.helpers.compare import assert_near
from tests.helpers.tiny import random_latents, random_tokens, tiny_dit, tiny_vae

BLOCK_SIZE = 4
LENGTH = 16


@st.composite
def rows(draw: st.DrawFn) -> tuple[int, list[list[int]], list[list[bool]]]:
    """A block size; each row's documents by block, then whether each of its blocks sees history."""
    block_size, num_blocks, batch = (
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
    )
    documents, shown = [], []
    for _ in range(batch):
        starts = [
            0,
            *draw(st.lists(st.integers(0, 1), min_size=num_blocks - 1, max_size=num_blocks - 1)),
        ]
        per_block = [sum(starts[: block + 1]) for block in range(num_blocks)]
        documents.append([document for document in per_block for _ in range(block_size)])
        sees = draw(st.lists(st.booleans(), min_size=num_blocks, max_size=num_blocks))
        shown.append([flag for flag in sees for _ in range(block_size)])
    return block_size, documents, shown


@given(rows(), st.booleans(), st.booleans())
def test_packed_mask_is_the_rules_enumerated(
    row: tuple[int, list[list[int]], list[list[bool]]], with_documents: bool, hides: bool
) -> None:
    block_size, documents, shown = row
    length = len(documents[0])
    places = packed_layout(
        length,
        block_size,
        torch.tensor(documents) if with_documents else None,
        torch.tensor(shown) if hides else None,
    )
    mask = visible_set_mask(places, places)
    for number in range(len(documents)):
        naive_row = naive.packed_row(
            length,
            block_size,
            documents[number] if with_documents else None,
            shown[number] if hides else None,
        )
        assert len(naive_row) == 2 * length - block_size
        expected = [[naive.is_visible(query, key) for key in naive_row] for query in naive_row]
        assert mask[number if mask.shape[0] > 1 else 0].tolist() == expected


@given(rows(), st.booleans())
def test_clean_mask_and_document_positions_are_the_rules_enumerated(
    row: tuple[int, list[list[int]], list[list[bool]]], with_documents: bool
) -> None:
    block_size, documents, _ = row
    places = clean_layout(
        len(documents[0]), block_size, torch.tensor(documents) if with_documents else None
    )
    mask = visible_set_mask(places, places)
    positions = document_positions(torch.tensor(documents))
    for number, of_row in enumerate(documents):
        naive_row = naive.clean_row(len(of_row), block_size, of_row if with_documents else None)
        assert mask[number if with_documents else 0].tolist() == [
            [naive.is_visible(q, k) for k in naive_row] for q in naive_row
        ]
        assert positions[number].tolist() == [
            place.position for place in naive.clean_row(len(of_row), block_size, of_row)
        ]


def sampled_times(batch: int, t: float) -> Times:
    return Times(torch.tensor([t, 0.0]), torch.zeros(batch, LENGTH, dtype=torch.long))


def velocities(
    dit: BlockCausalDiT,
    z_t: Tensor,
    history: Tensor,
    documents: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    return dit.velocity(z_t, history, sampled_times(len(z_t), 0.4), documents, shown).detach()


def changed_blocks(one: Tensor, other: Tensor) -> list[int]:
    """The blocks of row 0 in which anything differs."""
    difference = (one - other)[0].abs().amax(-1).unflatten(0, (-1, BLOCK_SIZE)).amax(-1)
    return (difference > 1e-6).nonzero().flatten().tolist()


def bump(x: Tensor, position: int) -> Tensor:
    x = x.clone()
    x[0, position] += 1.0
    return x


def test_a_noised_latent_changes_its_own_block_alone() -> None:
    dit, z_t, history = (
        tiny_dit(),
        random_latents(1, LENGTH, 4, seed=30),
        random_latents(1, LENGTH, 4, seed=31),
    )
    before = velocities(dit, z_t, history)
    for position in range(LENGTH):
        after = velocities(dit, bump(z_t, position), history)
        block = position // BLOCK_SIZE
        assert changed_blocks(before, after) == [block]
        # Bidirectional: every position of the block, the earlier ones included.
        inside = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        assert ((before - after)[0, inside].abs().amax(-1) > 1e-6).all()


def test_a_history_latent_changes_later_blocks_alone() -> None:
    dit, z_t, history = (
        tiny_dit(),
        random_latents(1, LENGTH, 4, seed=32),
        random_latents(1, LENGTH, 4, seed=33),
    )
    before = velocities(dit, z_t, history)
    for position in range(LENGTH):
        after = velocities(dit, z_t, bump(history, position))
        assert changed_blocks(before, after) == list(
            range(position // BLOCK_SIZE + 1, LENGTH // BLOCK_SIZE)
        )


def test_hidden_history_is_not_read() -> None:
    dit, z_t, history = (
        tiny_dit(),
        random_latents(1, LENGTH, 4, seed=34),
        random_latents(1, LENGTH, 4, seed=35),
    )
    shown = torch.tensor([True, True, False, True]).repeat_interleave(BLOCK_SIZE)[None]
    before = velocities(dit, z_t, history, shown=shown)
    after = velocities(dit, z_t, bump(history, 1), shown=shown)
    assert changed_blocks(before, after) == [1, 3]
    # Without history, a block is as the first of a row: positions are relative.
    alone = tiny_dit().velocity(
        z_t[:, 8:12],
        history[:, 8:12],
        Times(torch.tensor([0.4, 0.0]), torch.zeros(1, 4, dtype=torch.long)),
    )
    assert_near(before[:, 8:12], alone)


def test_another_document_is_not_read() -> None:
    dit, z_t, history = (
        tiny_dit(),
        random_latents(1, LENGTH, 4, seed=36),
        random_latents(1, LENGTH, 4, seed=37),
    )
    documents = torch.tensor([0, 0, 1, 1]).repeat_interleave(BLOCK_SIZE)[None]
    before = velocities(dit, z_t, history, documents)
    assert changed_blocks(before, velocities(dit, z_t, bump(history, 2), documents)) == [1]
    assert changed_blocks(before, velocities(dit, z_t, bump(history, 9), documents)) == [3]
    assert changed_blocks(before, velocities(dit, bump(z_t, 5), history, documents)) == [1]


DOCUMENT_LENGTHS = (4, 8, 4)


@pytest.fixture
def documents() -> Tensor:
    return torch.repeat_interleave(torch.arange(3), torch.tensor(DOCUMENT_LENGTHS))[None]


def test_documents_of_a_dit_row_are_as_each_alone(documents: Tensor) -> None:
    dit, z_t, history = (
        tiny_dit(),
        random_latents(1, LENGTH, 4, seed=38),
        random_latents(1, LENGTH, 4, seed=39),
    )
    packed = velocities(dit, z_t, history, documents)
    for z, h, expected in zip(
        *(x.split(DOCUMENT_LENGTHS, dim=1) for x in (z_t, history, packed)), strict=True
    ):
        times = Times(torch.tensor([0.4, 0.0]), torch.zeros(1, z.shape[1], dtype=torch.long))
        assert_near(dit.velocity(z, h, times), expected)
    assert changed_blocks(packed, velocities(dit, z_t, history)) == [1, 2, 3]


@pytest.mark.parametrize(("vae_block_size", "patch_size"), [(1, 1), (2, 1), (4, 2)])
def test_documents_of_a_vae_row_are_as_each_alone(
    documents: Tensor, vae_block_size: int, patch_size: int
) -> None:
    vae = tiny_vae(block_size=vae_block_size, patch_size=patch_size)
    tokens, latents = (
        random_tokens(1, LENGTH * patch_size, seed=40),
        random_latents(1, LENGTH, 4, seed=41),
    )
    posterior, logits = vae.encode(tokens, documents), vae.decode(latents, documents)
    token_lengths = [length * patch_size for length in DOCUMENT_LENGTHS]
    parts = zip(
        tokens.split(token_lengths, 1),
        latents.split(DOCUMENT_LENGTHS, 1),
        posterior.mean.split(DOCUMENT_LENGTHS, 1),
        posterior.logvar.split(DOCUMENT_LENGTHS, 1),
        logits.split(token_lengths, 1),
        strict=True,
    )
    for x, z, mean, logvar, expected in parts:
        assert_near(vae.encode(x).mean, mean)
        assert_near(vae.encode(x).logvar, logvar)
        assert_near(vae.decode(z), expected)
    assert changed_blocks(posterior.mean, vae.encode(tokens).mean) == [1, 2, 3]


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 4]), st.integers(0, LENGTH - 1))
def test_the_vae_is_causal_by_its_own_blocks(block_size: int, position: int) -> None:
    vae, tokens = tiny_vae(block_size=block_size), random_tokens(1, LENGTH, seed=42)
    other = tokens.clone()
    other[0, position] = 4 if tokens[0, position] != 4 else 5
    moved = (vae.encode(tokens).mean - vae.encode(other).mean)[0].abs().amax(-1) > 1e-6
    first = position // block_size * block_size
    assert moved.nonzero().flatten().tolist() == list(range(first, LENGTH))
    z = random_latents(1, LENGTH, 4, seed=43)
    moved = (vae.decode(z) - vae.decode(bump(z, position)))[0].abs().amax(-1) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(first, LENGTH))

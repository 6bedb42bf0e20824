"""Codes: words of bits that tell tokens apart, and are near where neighbors are the same."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_train.families.cola.bits.codes import BitCodes
from cola_train.families.cola.bits.sizes import bits_for
from cola_train.likelihood.token_tables import PairTally


def tally_of(rows: torch.Tensor, num_tokens: int) -> PairTally:
    pairs, all_of_it = PairTally(num_tokens), torch.ones_like(rows, dtype=torch.bool)
    pairs.add(rows, all_of_it, ~all_of_it)
    return pairs


@given(
    num_tokens=st.integers(1, 40),
    more=st.integers(0, 3),
    rows=st.integers(1, 5),
    seed=st.integers(0),
)
def test_every_token_has_a_word_of_its_own(
    num_tokens: int, more: int, rows: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 2**60)
    # Some tokens are never seen, and a few are most of the text.
    drawn = torch.rand(rows, 12, generator=generator) ** 3 * num_tokens
    pairs = tally_of(drawn.long(), num_tokens)
    channels = 2 * (bits_for(num_tokens) + more)
    found = BitCodes.of(pairs, channels)
    assert len(found.bits.unique(dim=0)) == num_tokens
    assert set(found.bits.unique().tolist()) <= {-1.0, 1.0}
    codes = found.codes
    assert codes.shape == (num_tokens, channels)
    assert codes.mean(1).abs().max() < 1e-6
    assert (codes.square().mean(1) - 1).abs().max() < 1e-5
    again = BitCodes.of(pairs, channels)
    assert torch.equal(again.codes, codes)
    # Log-odds of each bit, by enumeration.
    p = pairs.unigram()
    for bit, log_odds in enumerate(found.log_odds):
        up = sum(float(p[k]) for k in range(num_tokens) if found.bits[k, bit] > 0)
        if 1e-6 < up < 1 - 1e-6:
            assert abs(torch.tensor(up).logit() - log_odds) < 1e-3


def test_tokens_with_the_same_neighbors_differ_in_late_bits_alone() -> None:
    # Two languages, each of tokens that may replace each other, stand in turn: 0..7, 8..15.
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 8, (200, 16), generator=generator)
    second = torch.randint(8, 16, (200, 16), generator=generator)
    rows = torch.stack([first, second], dim=2).flatten(1)
    bits = BitCodes.of(tally_of(rows, 16), 8).bits
    assert len(bits[:8, 0].unique()) == 1
    assert bits[0, 0] == -bits[8, 0]


def test_halves_are_as_frequent_as_tokens_allow() -> None:
    # One token is half of all text: it is alone at once, and its other bits are +1.
    rows = torch.tensor([list(itertools.chain(*((0, k) for k in range(1, 8))))] * 9)
    found = BitCodes.of(tally_of(rows, 8), 2 * 8)
    assert (found.bits[1:, 0] == -found.bits[0, 0]).all()
    assert (found.bits[0, 1:] == 1).all()
    assert found.log_odds[0].abs() < 0.1

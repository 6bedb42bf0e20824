"""Token choice by hand, by enumeration of the distribution, and by frequency."""

import math

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.randomness import Purpose, uniform
from cola_train.sampling.token_choice import choose_tokens, penalize_repetition
from tests.helpers.statistics import assert_shares

LOGITS = st.lists(
    st.floats(-6, 6, width=32, allow_subnormal=False), min_size=1, max_size=12, unique=True
)


def test_the_penalty_by_hand() -> None:
    logits = torch.tensor(
        [
            [[2.0, -2.0, 0.0, 3.0, -3.0], [4.0, -4.0, 1.0, 0.5, -0.5]],
            [[1.0, 1.0, 1.0, -1.0, -1.0]] * 2,
        ]
    )
    seen = torch.tensor([[True, True, True, False, False], [False, False, False, True, True]])
    expected = torch.tensor(
        [
            [
                [2.0 / 1.25, -2.0 * 1.25, 0.0, 3.0, -3.0],
                [4.0 / 1.25, -4.0 * 1.25, 1.0 / 1.25, 0.5, -0.5],
            ],
            [[1.0, 1.0, 1.0, -1.25, -1.25]] * 2,
        ]
    )
    torch.testing.assert_close(penalize_repetition(logits, seen, 1.25), expected)
    assert torch.equal(penalize_repetition(logits, seen, 1.0), logits)
    assert torch.equal(penalize_repetition(logits, torch.zeros_like(seen), 1.25), logits)


@given(LOGITS, st.floats(1.01, 3.0))
def test_a_penalty_never_raises_and_never_changes_sign(logits: list[float], penalty: float) -> None:
    before = torch.tensor(logits)[None, None]
    after = penalize_repetition(before, torch.ones(1, len(logits), dtype=torch.bool), penalty)
    assert (after <= before).all()
    assert torch.equal(after.sign(), before.sign())


def distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> dict[int, float]:
    """Share of each id that may be chosen: the k likeliest, renormalized, then the fewest that
    reach top_p, renormalized.
    """
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    weights = {token: math.exp((logits[token] - logits[order[0]]) / temperature) for token in order}
    total = sum(weights.values())
    kept: dict[int, float] = {}
    for token in order:
        reached = sum(kept.values())
        if abs(reached - top_p) < 1e-9:
            reject()  # which side of an exact tie, rounding decides
        if kept and reached >= top_p:
            break
        kept[token] = weights[token] / total
    return {token: share / sum(kept.values()) for token, share in kept.items()}


def choose(
    logits: list[float], draws: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    config = SamplerConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    return choose_tokens(torch.tensor(logits).expand(1, len(draws), -1), config, draws[None])[0]


@settings(max_examples=60)
@given(LOGITS, st.floats(0.2, 3.0), st.integers(0, 14), st.floats(0.05, 1.0))
def test_evenly_spread_draws_give_the_enumerated_distribution(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    expected = distribution(logits, temperature, top_k, top_p)
    draws = (torch.arange(2000) + 0.5) / 2000
    counts = choose(logits, draws, temperature, top_k, top_p).bincount(minlength=len(logits))
    for token, count in enumerate(counts.tolist()):
        # Inverse CDF: an id gets its share of an even grid, to one grid point at either end.
        assert abs(count - 2000 * expected.get(token, 0.0)) <= 1.01


@settings(max_examples=30)
@given(LOGITS, st.floats(0.2, 3.0), st.integers(0, 14), st.floats(0.05, 1.0))
def test_the_first_and_the_last_draw_choose_what_may_be_chosen(
    logits: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    expected = distribution(logits, temperature, top_k, top_p)
    first, last = choose(
        logits, torch.tensor([0.0, 1 - 2**-24]), temperature, top_k, top_p
    ).tolist()
    assert first == max(expected, key=lambda token: logits[token])
    assert last in expected


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(0, 1.0, 8), (4, 1.0, 4), (0, 0.75, 4), (6, 0.75, 3), (2, 0.9, 2)]
)
def test_seeded_draws_follow_the_distribution(top_k: int, top_p: float, kept: int) -> None:
    logits = [0.3, 1.5, -0.2, 0.9, 1.1, -1.0, 0.0, 0.5]
    expected = distribution(logits, 0.8, top_k, top_p)
    assert len(expected) == kept
    draws = uniform(3, Purpose.SAMPLER_TOKEN, torch.arange(200), 100).flatten()
    counts = choose(logits, draws, 0.8, top_k, top_p).bincount(minlength=len(logits))
    assert {token for token, count in enumerate(counts.tolist()) if count} == set(expected)
    tokens = list(expected)
    assert_shares(counts[tokens], torch.tensor([expected[token] for token in tokens]))


@given(LOGITS)
def test_settings_that_leave_one_id_are_greedy(logits: list[float]) -> None:
    best = max(range(len(logits)), key=logits.__getitem__)
    draws = torch.tensor([0.0, 0.3, 0.999])
    assert choose(logits, draws, 1.0, 1, 1.0).tolist() == [best] * 3
    assert choose(logits, draws, 1.0, 0, 1e-9).tolist() == [best] * 3
    assert choose_tokens(
        torch.tensor([[logits]]), SamplerConfig(temperature=0.0), None
    ).tolist() == [[best]]


def test_each_position_uses_its_own_draw_and_logits() -> None:
    logits = torch.tensor(
        [[[0.0, 0.0, -90.0], [0.0, -90.0, 0.0]], [[-90.0, 0.0, 0.0], [0.0, 0.0, -90.0]]]
    )
    config = SamplerConfig(temperature=1.0, top_k=0, top_p=1.0)
    chosen = choose_tokens(logits, config, torch.tensor([[0.1, 0.9], [0.9, 0.1]]))
    low_high = [[{0, 1}, {0, 2}], [{1, 2}, {0, 1}]]
    other = choose_tokens(logits, config, torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    for row in range(2):
        for place in range(2):
            assert {int(chosen[row, place]), int(other[row, place])} == low_high[row][place]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_choose_nothing(temperature: float, value: float) -> None:
    logits = torch.zeros(2, 3, 5)
    config = SamplerConfig(temperature=temperature)
    choose_tokens(logits, config, torch.zeros(2, 3))
    logits[1, 2, 3] = value
    with pytest.raises(UserError, match="logits are not finite"):
        choose_tokens(logits, config, torch.zeros(2, 3))
    logits[1, 2, 3] = -math.inf
    choose_tokens(logits, config, torch.zeros(2, 3))

"""The generator against its published vectors and a scalar re-implementation; the draws against
their distributions.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.data.batch import VALIDATION_SAMPLE_OFFSET
from cola_train.randomness import Purpose, named_generator, normal, philox4x32, uniform
from tests.helpers.statistics import assert_distribution, assert_uncorrelated

WORD = st.integers(0, 2**32 - 1)
# Random123's known answers for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox(counter: list[int], seed: int) -> list[int]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return [int(word) for word in philox4x32((c0, c1, c2, c3), seed)]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in Python's unbounded integers."""
    for number in range(10):
        k = [(key[0] + number * 0x9E3779B9) % 2**32, (key[1] + number * 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ k[0], low1, high0 ^ counter[3] ^ k[1], low0]
    return counter


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    low, high = words(key)
    assert philox(words(counter), (high << 32) + low) == words(result)
    assert scalar_philox(words(counter), words(key)) == words(result)


@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 9)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_samples_may_each_skip_their_own_number(samples: list[tuple[int, int]], count: int) -> None:
    index, starts = (
        torch.tensor([i for i, _ in samples]),
        torch.tensor([4 * fours for _, fours in samples]),
    )
    for draw in (uniform, normal):
        together = draw(3, Purpose.SAMPLER_NOISE, index, count, starts)
        for row, (_, fours) in enumerate(samples):
            whole = draw(3, Purpose.SAMPLER_NOISE, index[row : row + 1], 4 * fours + count)
            assert torch.equal(together[row], whole[0, 4 * fours :])


@given(st.lists(WORD, min_size=4, max_size=4), WORD, WORD)
def test_philox_equals_unbounded_integers(counter: list[int], low: int, high: int) -> None:
    assert philox(counter, (high << 32) + low) == scalar_philox(counter, [low, high])


@given(
    seed=st.integers(0, 2**64 - 1),
    purpose=st.sampled_from(Purpose),
    index=st.integers(0, 2**63 - 1),
    place=st.integers(0, 40),
)
def test_a_draw_is_the_generator_at_its_address(
    seed: int, purpose: Purpose, index: int, place: int
) -> None:
    block, word = divmod(place, 4)
    counter = [block, int(purpose), index % 2**32, index >> 32]
    bits = scalar_philox(counter, [seed % 2**32, seed >> 32])
    draws = uniform(seed, purpose, torch.tensor([index]), place + 1)
    assert float(draws[0, place]) == (bits[word] >> 8) / 2**24
    # Box and Muller: two words make the two normals in their places.
    radius, angle = ((bits[word // 2 * 2 + k] + 0.5) / 2**32 for k in range(2))
    expected = math.sqrt(-2 * math.log(radius)) * (math.sin if word % 2 else math.cos)(
        2 * math.pi * angle
    )
    normals = normal(seed, purpose, torch.tensor([index]), place + 1)
    assert float(normals[0, place]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("draw", [uniform, normal])
@settings(max_examples=30)
@given(data=st.data())
def test_a_sample_draws_the_same_in_any_batch_and_in_any_chunks(draw, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    indices = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
    count = data.draw(st.integers(1, 30))
    together = draw(5, Purpose.FLOW_NOISE, torch.tensor(indices), count)
    assert together.shape == (len(indices), count)
    for row, index in enumerate(indices):
        alone = torch.tensor([index])
        assert torch.equal(draw(5, Purpose.FLOW_NOISE, alone, count)[0], together[row])
        start = 4 * data.draw(st.integers(0, (count - 1) // 4))
        rest = draw(5, Purpose.FLOW_NOISE, alone, count - start, start)
        assert torch.equal(rest[0], together[row, start:])
    # Asking for more does not change the first ones.
    assert torch.equal(
        draw(5, Purpose.FLOW_NOISE, torch.tensor(indices), count + 9)[:, :count], together
    )


def test_a_start_within_a_block_of_four_is_refused() -> None:
    with pytest.raises(AssertionError):
        uniform(0, Purpose.FLOW_TIME, torch.tensor([0]), 4, start=2)


def test_uniform_draws_are_uniform() -> None:
    draws = uniform(66, Purpose.FLOW_TIME, torch.arange(500), 200)
    assert draws.dtype == torch.float32
    assert 0 <= draws.min() < 1e-3
    assert 0.999 < draws.max() < 1
    assert_distribution(draws, draws)
    # One draw of many samples, and many draws of one sample, are as good.
    across, along = (
        uniform(66, Purpose.FLOW_TIME, torch.arange(20_000), 1),
        uniform(66, Purpose.FLOW_TIME, torch.tensor([3]), 20_000),
    )
    assert_distribution(across, across)
    assert_distribution(along, along)


def test_normal_draws_are_normal() -> None:
    draws = normal(66, Purpose.FLOW_NOISE, torch.arange(500), 200)
    count = draws.numel()
    assert draws.dtype == torch.float32
    assert_distribution(draws, torch.special.ndtr(draws.double()))
    # E x, E x^2, E x^3, E x^4 of a standard normal, whose deviations are sqrt(1, 2, 15, 96) /
    # sqrt(n).
    for power, (mean, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs(float(draws.double().pow(power).mean()) - mean) < 5 * (variance / count) ** 0.5
    # The two normals of a Box-Muller pair.
    assert_uncorrelated(draws[:, ::2], draws[:, 1::2])
    assert_uncorrelated(draws[:, ::2].square(), draws[:, 1::2].square())
    # A tail that a float32 logarithm would cut.
    assert normal(66, Purpose.FLOW_NOISE, torch.arange(1000), 1000).abs().max() > 4.5


def test_addresses_share_nothing() -> None:
    indices = torch.arange(300)
    streams = {
        (seed, purpose, offset): uniform(seed, purpose, indices + offset, 64)
        for seed, purpose, offset in [
            *((66, purpose, 0) for purpose in Purpose),
            (67, Purpose.FLOW_TIME, 0),
            (66 + 2**32, Purpose.FLOW_TIME, 0),
            (66, Purpose.FLOW_TIME, 300),
            (66, Purpose.FLOW_TIME, 2**32),
            (66, Purpose.FLOW_TIME, VALIDATION_SAMPLE_OFFSET),
        ]
    }
    for one, other in itertools.combinations(streams.values(), 2):
        assert_uncorrelated(one, other)
    # Nor is a stream another one moved along, within a sample or across samples.
    time = streams[66, Purpose.FLOW_TIME, 0]
    for shift in range(1, 9):
        assert_uncorrelated(time[:, shift:], time[:, :-shift])
        assert_uncorrelated(time[shift:], time[:-shift])


def test_purposes_keep_their_numbers_apart() -> None:
    assert len({int(purpose) for purpose in Purpose}) == len(Purpose.__members__)


def test_named_generators() -> None:
    def draw(seed: int, name: str) -> list[float]:
        return torch.rand(4, generator=named_generator(seed, name)).tolist()

    assert draw(1, "vae.a") == draw(1, "vae.a")
    drawn = [
        tuple(draw(seed, name)) for seed in (1, 2, 2**62) for name in ("vae.a", "vae.b", "dit.a")
    ]
    assert len(set(drawn)) == len(drawn)

"""Figures of texts that continue openings, and how sure they and their differences are."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from cola_train.bootstrap import bootstrap_generator, percentile_interval

Texts = Sequence[Sequence[int]]

_NUM_RESAMPLES = 2000
LEVEL = 0.95  # of intervals


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric with its bootstrap standard error over openings.

    `count` is the number of tokens, n-grams, words or openings that it is of.
    """

    value: float
    standard_error: float
    count: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric of one model less that of another, after the same openings.

    The bootstrap draws an opening for both: what makes it hard or easy for both cancels. `low` and
    `high` hold the middle 95 % of the resamples.
    """

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A metric, and how much of it is due to each opening.

    The bootstrap resamples `influences`, to first order what one more of the opening would add. It
    is exact for sums; of shares of kinds, which duplicates would lower and so pull away from their
    value, it has the spread of leaving openings out, and of divergences that of their derivative.
    """

    value: float
    count: int  # as in `Estimate`
    influences: Float64[np.ndarray, " openings"]


def difference(
    one: Statistic, other: Statistic, changes: Float64[np.ndarray, "resamples openings"]
) -> Difference:
    """`one` less `other`; `changes` are how much more often than once openings are drawn."""
    value = one.value - other.value
    ends = percentile_interval(changes @ (one.influences - other.influences), LEVEL)
    return Difference(value, value + ends.low, value + ends.high)


def _grams(ids: Sequence[object]) -> Iterator[tuple[object, ...]]:
    return zip(ids, ids[1:], ids[2:], ids[3:])


def pairs_of(prompts: Texts, texts: Texts) -> list[list[tuple[int, int]]]:
    """Neighboring tokens of each continuation, also its prompt's last token and its first."""
    return [[*itertools.pairwise([prompt[-1], *text])] for prompt, text in zip(prompts, texts)]


def ratio(parts: Sequence[float], wholes: Sequence[int]) -> Statistic:
    """The openings' parts together over their wholes together; 0 of 0 is 0."""
    part, whole = np.array(parts, dtype=np.float64), np.array(wholes, dtype=np.float64)
    total = max(float(whole.sum()), 1.0)
    value = float(part.sum()) / total
    return Statistic(value, sum(wholes), (part - value * whole) / total)


def repetition(prompts: Texts, texts: Texts) -> Statistic:
    """The share of 4-grams of the texts that stand earlier in their opening or text."""
    repeated, total = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        grams, num_written = [*_grams([*prompt, *text])], max(len(text) - 3, 0)
        first = {gram: place for place, gram in reversed([*enumerate(grams)])}
        written = range(len(grams) - num_written, len(grams))
        repeated.append(sum(first[grams[place]] < place for place in written))
        total.append(num_written)
    return ratio(repeated, total)


def distinct(texts: Sequence[Sequence[object]]) -> Statistic:
    """Different 4-grams of all texts, of tokens or words, over all their 4-grams."""
    grams = [[*_grams(text)] for text in texts]
    kinds = [set(some) for some in grams]
    openings_of = Counter(kind for some in kinds for kind in some)
    # Without an opening, the 4-grams that it alone has are gone.
    own = np.array([sum(openings_of[kind] == 1 for kind in some) for some in kinds])
    sizes = np.array([len(some) for some in grams])
    total = max(int(sizes.sum()), 1)
    value = len(openings_of) / total
    without = (len(openings_of) - own) / np.maximum(total - sizes, 1)
    return Statistic(value, int(sizes.sum()), value - without)


def mean_entropy(texts: Sequence[Sequence[object]]) -> Statistic:
    """The entropy of the shares of a text's own tokens, nats, the mean over texts."""
    entropies = []
    for text in texts:
        uses = np.array([*Counter(text).values()], dtype=np.float64)
        shares = uses / uses.sum()
        entropies.append(float(shares @ np.log(1 / shares)))
    return ratio(entropies, [1] * len(texts))


def divergence(texts: Sequence[Sequence[object]], real: Sequence[Sequence[object]]) -> Statistic:
    """Between one half's texts and the other half's real ones, the mean of both ways."""
    kinds = dict.fromkeys(kind for text in (*texts, *real) for kind in text)
    numbers = {kind: number for number, kind in enumerate(kinds)}
    halves = (range(len(texts) // 2), range(len(texts) // 2, len(texts)))
    value, influences = 0.0, np.zeros(len(texts))
    for mine, other in (halves, halves[::-1]):
        sides = [(texts, mine), (real, other)]
        uses = [_uses(some, chosen, numbers) for some, chosen in sides]
        shares = [np.bincount(used, minlength=len(numbers)) / len(used) for used, _ in uses]
        middle = sum(shares) / 2
        for side, (used, owner) in zip(shares, uses, strict=True):
            # d JS / d side is log(side / middle) / 2; there are two ways.
            slope = np.log(np.where(side > 0, side, 1) / np.where(side > 0, middle, 1)) / 4
            value += float(side @ slope)
            influences += np.bincount(owner, slope[used] / len(used), minlength=len(texts))
    return Statistic(value, sum(map(len, texts)), influences)


def _uses(
    texts: Sequence[Sequence[object]], chosen: range, numbers: Mapping[object, int]
) -> tuple[Int64[np.ndarray, " uses"], Int64[np.ndarray, " uses"]]:
    """What each use of a kind in the chosen openings is of, and the opening that it is in."""
    used = [numbers[kind] for opening in chosen for kind in texts[opening]]
    owner = np.repeat(np.array(chosen), [len(texts[opening]) for opening in chosen])
    return np.array(used), owner


def resamples(num_openings: int) -> Float64[np.ndarray, "resamples openings"]:
    """How often each opening is drawn: each half is resampled by itself, so that none is empty."""
    half, generator = num_openings // 2, bootstrap_generator()
    draws = [
        generator.multinomial(size, np.full(size, 1 / size), size=_NUM_RESAMPLES)
        for size in (half, num_openings - half)
    ]
    return np.concatenate(draws, axis=1).astype(np.float64)

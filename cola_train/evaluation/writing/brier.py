"""BrierLM: how well samples predict what follows; no likelihood is asked for, so of any family.

After a prefix, with y the n tokens that really follow and x1, x2 two independent samples of n
tokens, 1[x1 = y] + 1[x2 = y] - 1[x1 = x2] is an unbiased estimate of 2 p(y) - sum over x of p(x)^2,
which is 1 less Brier's score: only the true distribution has the largest mean. BrierLM is 100 times
the geometric mean of the means for n = 1, 2, 3 and 4 (Shao et al., "Continuous autoregressive
language models", 2025).
"""

import dataclasses
import random
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from cola_train.bootstrap import Interval, percentile_interval
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.comparison import Generator, continuations, until_end
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.statistics import LEVEL, Difference, Estimate, resamples

LONGEST = 4  # tokens
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A place in a held-out row, chosen whatever follows."""

    row: int  # in the order in which rows are taken
    tokens: list[int]
    following: list[int]  # LONGEST ids, or fewer of which the last is the separator


@dataclasses.dataclass(frozen=True)
class Brier:
    """The figures `brier_1` to `brier_4`, at most 1, and `brier_lm`, at most 100, by name.

    Below 0 is worse than to know nothing; `brier_lm` is 0 where one of the others is not above 0.
    `resampled` are the figures of bootstrap resamples of rows.
    """

    num_prefixes: int
    values: dict[str, float]
    resampled: dict[str, Float64[np.ndarray, " resamples"]]

    def estimates(self) -> dict[str, Estimate]:
        """Each figure with its standard error, by name."""
        return {
            name: Estimate(value, float(np.std(self.resampled[name], ddof=1)), self.num_prefixes)
            for name, value in self.values.items()
        }

    def intervals(self) -> dict[str, Interval | None]:
        """The middle 95 % of the resamples of each figure, by name.

        None of a figure to which every row gives the same: resamples then say nothing of how far
        it is from what other rows would give.
        """
        found = {name: percentile_interval(some, LEVEL) for name, some in self.resampled.items()}
        return {name: one if one.low < one.high else None for name, one in found.items()}

    def less(self, other: "Brier") -> dict[str, Difference]:
        """The figures less those of another model after the same prefixes, by name."""
        return {
            name: Difference(
                value - other.values[name],
                *percentile_interval(self.resampled[name] - other.resampled[name], LEVEL),
            )
            for name, value in self.values.items()
        }


def brier(sampled: Generator, data: PreparedData, config: ComparisonConfig) -> Brier:
    """Let a model continue each prefix twice, and see how often it is right and how often certain.

    A text that ends is followed by nothing: after the separator all n-grams are alike.
    """
    prefixes = brier_prefixes(data, config.num_openings, config.brier_places)
    twice = [prefix.tokens for prefix in prefixes for _ in range(2)]
    texts = continuations(sampled, twice, data, LONGEST)
    num_rows = 1 + prefixes[-1].row
    scores, counts = np.zeros((num_rows, LONGEST)), np.zeros((num_rows, 1))
    for prefix, one, two in zip(prefixes, texts[::2], texts[1::2], strict=True):
        scores[prefix.row] += [_score(one, two, prefix.following, n) for n in range(1, LONGEST + 1)]
        counts[prefix.row] += 1
    drawn = resamples(num_rows)
    means = scores.sum(0, keepdims=True) / counts.sum()
    values = {name: float(some[0]) for name, some in _figures(means).items()}
    return Brier(len(prefixes), values, _figures(drawn @ scores / (drawn @ counts)))


def brier_prefixes(data: PreparedData, num_rows: int, places: int) -> list[Prefix]:
    """Up to `places` prefixes of each of up to `num_rows` held-out rows, in their order.

    They end after a quarter of the row or later, and have no padding in them or behind them. The
    choice depends on the data and `places` alone, and fewer rows are the first of more.
    """
    seq_len, pad = data.manifest.seq_len, data.tokenizer.pad_token_id
    order = random.Random(_SEED).sample(range(data.num_rows(VALIDATION)), data.num_rows(VALIDATION))
    cuts = range(max(1, seq_len // 4), seq_len - LONGEST + 1)
    prefixes: list[Prefix] = []
    taken = 0
    for index in order:
        row = data.row(VALIDATION, index)[0].tolist()
        chosen = random.Random(f"{_SEED}/{index}").sample(cuts, min(places, len(cuts)))
        good = [cut for cut in chosen if pad not in row[: cut + LONGEST]]
        for cut in good:
            following = until_end(row[cut : cut + LONGEST], LONGEST, data)
            prefixes.append(Prefix(taken, row[:cut], following))
        taken += bool(good)
        if taken == num_rows:
            break
    return prefixes


def _score(one: Sequence[int], two: Sequence[int], real: Sequence[int], n: int) -> int:
    first, second, wanted = one[:n], two[:n], real[:n]
    return (first == wanted) + (second == wanted) - (first == second)


def _figures(
    means: Float64[np.ndarray, "samples orders"],
) -> dict[str, Float64[np.ndarray, " samples"]]:
    figures = {f"brier_{n}": means[:, n - 1] for n in range(1, LONGEST + 1)}
    return {**figures, "brier_lm": 100 * np.maximum(means, 0).prod(1) ** (1 / LONGEST)}

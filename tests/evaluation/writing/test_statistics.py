"""How sure figures of written text are: against what they do over many draws of the openings."""

from collections.abc import Callable

import numpy as np
import pytest

from cola_train.evaluation.writing.statistics import (
    Statistic,
    difference,
    distinct,
    divergence,
    mean_entropy,
    ratio,
    resamples,
)

OPENINGS, LENGTH, VOCAB, TIMES = 40, 20, 60, 100
CHANGES = resamples(OPENINGS) - 1
Texts = list[list[int]]
METRICS: dict[str, Callable[[Texts, Texts], Statistic]] = {
    "sevens": lambda texts, real: ratio([text.count(7) for text in texts], [*map(len, texts)]),
    "distinct_4gram_share": lambda texts, real: distinct(texts),
    "unigram_divergence": divergence,
    "continuation_entropy": lambda texts, real: mean_entropy(texts),
}


def draw(seed: int) -> tuple[Texts, Texts, Texts]:
    """Real continuations, and two writers': each opening has a topic of its own that all share."""
    generator = np.random.default_rng([7, seed])
    shares = [np.arange(1, VOCAB + 1.0) ** -power for power in (1.0, 1.1, 0.9)]
    topics = generator.gamma(0.5, size=(OPENINGS, VOCAB)) + 1e-3
    texts = []
    for share in shares:
        below = np.cumsum(topics * share, axis=1)
        drawn = generator.random((OPENINGS, LENGTH // 2)) * below[:, -1:]
        # Every second token follows from the one before, so that 4-grams come again.
        tokens = (drawn[..., None] > below[:, None]).sum(-1)
        texts.append(np.stack([tokens, (3 * tokens + 1) % VOCAB], axis=-1).reshape(OPENINGS, -1))
    real, one, other = (text.tolist() for text in texts)
    return real, one, other


@pytest.mark.parametrize("name", METRICS)
def test_errors_and_paired_intervals_are_those_of_new_openings(name: str) -> None:
    values, errors, paired = [], [], []
    for seed in range(TIMES):
        real, *written = draw(seed)
        one, other = (METRICS[name](texts, real) for texts in written)
        values.append(one.value)
        errors.append(np.std(CHANGES @ one.influences, ddof=1))
        paired.append(difference(one, other, CHANGES))
    # 100 draws know a standard deviation to 7 %. Resampling the texts themselves gave 1.5 to 2
    # times the spread of divergences.
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.3)
    middle = np.mean([found.value for found in paired])
    assert np.mean([found.low <= middle <= found.high for found in paired]) > 0.89
    spread = np.std([found.value for found in paired])
    widths = [(found.high - found.low) / (2 * 1.96) for found in paired]
    assert np.mean(widths) == pytest.approx(spread, rel=0.3)


def test_what_both_share_cancels() -> None:
    real, one, _ = draw(0)
    for metric in METRICS.values():
        found = difference(metric(one, real), metric(one, real), CHANGES)
        assert (found.value, found.low, found.high) == (0, 0, 0)

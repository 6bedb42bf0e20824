"""The n-gram judge, against the textbook's sums written out, and on real text."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.ngram import NgramJudge

VOCAB, PAD = 6, 2

ids = st.integers(0, VOCAB - 1)
orders = st.integers(1, 4)
contexts = st.lists(ids, max_size=6)


@st.composite
def rows_of_ids(draw: st.DrawFn) -> np.ndarray:
    seq = draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(ids, min_size=seq, max_size=seq), min_size=1, max_size=6))
    return np.array(rows, dtype=np.int64)


def train(rows: np.ndarray, order: int) -> NgramJudge:
    return NgramJudge.train(rows, VOCAB, PAD, order)


class Textbook:
    """Interpolated Kneser-Ney with three discounts, one probability at a time."""

    def __init__(self, rows: list[list[int]], order: int) -> None:
        seen: dict[int, Counter[tuple[int, ...]]] = {}
        for n in range(1, order + 1):
            grams = [
                tuple(row[place : place + n]) for row in rows for place in range(len(row) - n + 1)
            ]
            seen[n] = Counter(gram for gram in grams if PAD not in gram)
        self.order = order
        self.counts = {n: Counter(gram[1:] for gram in seen[n + 1]) for n in range(1, order)} | {
            order: seen[order]
        }
        self.discounts = {n: self.estimate(self.counts[n]) for n in self.counts}

    @staticmethod
    def estimate(counts: Counter[tuple[int, ...]]) -> list[float]:
        n1, n2, n3, n4 = ([*counts.values()].count(times) for times in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return [0.5, 1.0, 1.5]
        y = n1 / (n1 + 2 * n2)
        found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return found if min(found) > 0 else [0.5, 1.0, 1.5]

    def probability(self, token: int, context: tuple[int, ...]) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        shorter = self.probability(token, context[1:]) if context else 1 / VOCAB
        n = len(context) + 1
        followers = {other: self.counts[n][*context, other] for other in range(VOCAB)}
        total = sum(followers.values())
        if total == 0:
            return shorter
        taken = {
            other: self.discounts[n][min(count, 3) - 1]
            for other, count in followers.items()
            if count
        }
        return (followers[token] - taken.get(token, 0.0) + sum(taken.values()) * shorter) / total


@given(rows_of_ids(), orders, contexts, contexts)
def test_it_is_the_textbooks(
    rows: np.ndarray, order: int, context: list[int], continuation: list[int]
) -> None:
    textbook = Textbook(rows.tolist(), order)
    text = [*context, *continuation]
    expected = [
        -math.log(textbook.probability(text[k], tuple(text[:k])))
        for k in range(len(context), len(text))
    ]
    assert train(rows, order).nats(context, continuation) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(3, 4))
def test_it_is_the_textbooks_with_discounts_that_can_be_estimated(seed: int, order: int) -> None:
    generator = np.random.default_rng(seed)
    # Steep enough that there are n-grams of every small count; padding is the rarest.
    rows = np.array([0, 1, 3, 4, 5, PAD])[
        np.minimum(generator.geometric(0.4, size=(60, 12)), VOCAB) - 1
    ]
    textbook, judge = Textbook(rows.tolist(), order), train(rows, order)
    assume(textbook.discounts[order] != [0.5, 1.0, 1.5])
    text = rows[0].tolist()
    expected = [-math.log(textbook.probability(text[k], tuple(text[:k]))) for k in range(len(text))]
    assert judge.nats([], text) == pytest.approx(expected, rel=1e-9)


@given(rows_of_ids(), orders, contexts)
def test_probabilities_of_any_context_add_up_to_one(
    rows: np.ndarray, order: int, context: list[int]
) -> None:
    judge = train(rows, order)
    probabilities = [math.exp(-judge.nats(context, [token])[0]) for token in range(VOCAB)]
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-12)
    assert min(probabilities) > 0


@given(rows_of_ids(), st.permutations(range(6)), orders, contexts)
def test_rows_are_apart(rows: np.ndarray, places: list[int], order: int, text: list[int]) -> None:
    """An n-gram across an edge would come and go with the order of the rows."""
    shuffled = rows[[place for place in places if place < len(rows)]]
    assert train(shuffled, order).nats([], text) == pytest.approx(
        train(rows, order).nats([], text), rel=1e-12
    )


@given(rows_of_ids(), orders, contexts, contexts)
def test_padding_is_the_least_likely_and_hides_what_stands_before_it(
    rows: np.ndarray, order: int, before: list[int], text: list[int]
) -> None:
    judge = train(rows, order)
    assert (
        judge.nats(before, [PAD])[0]
        >= max(judge.nats(before, [token])[0] for token in range(VOCAB)) - 1e-12
    )
    assert judge.nats([*before, PAD], text) == pytest.approx(judge.nats([PAD], text), rel=1e-12)


def test_no_more_than_the_order_is_read_before_a_token() -> None:
    rows = np.random.default_rng(3).integers(0, VOCAB, (40, 10))
    judge = train(rows, 3)
    assert judge.nats([0, 1, 3, 4], [5])[0] == judge.nats([3, 4], [5])[0] != judge.nats([4], [5])[0]
    assert judge.nats([1], []).shape == (0,)


def test_held_out_text_is_likelier_than_its_tokens_shuffled_and_a_longer_order_knows_more(
    prepared_folder: Path,
) -> None:
    data, generator = PreparedData.open(prepared_folder), np.random.default_rng(4)
    rows, held_out = (
        np.stack([data.row(split, k)[0] for k in range(data.num_rows(split))])
        for split in (TRAIN, VALIDATION)
    )

    def mean(order: int, texts: np.ndarray) -> float:
        judge = NgramJudge.train(rows, data.manifest.vocab_size, data.tokenizer.pad_token_id, order)
        return float(np.mean([judge.nats([], text.tolist()) for text in texts]))

    shuffled = generator.permuted(held_out, axis=1)
    assert mean(1, shuffled) == pytest.approx(mean(1, held_out))
    assert (
        mean(3, held_out)
        < mean(2, held_out)
        < mean(1, held_out)
        < math.log(data.manifest.vocab_size)
    )
    assert mean(3, shuffled) > mean(1, held_out)

"""BrierLM against what it estimates: figures computed from probabilities."""

import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.brier import LONGEST, brier, brier_prefixes
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.writers import writer_of
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from tests.helpers.llama import tiny_transformer

NAMES = [f"brier_{n}" for n in range(1, LONGEST + 1)]
CONFIG = ComparisonConfig(num_openings=10**6, brier_places=8)


@pytest.fixture
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


def test_ar_has_the_value_of_its_probabilities(data: PreparedData) -> None:
    network = tiny_transformer(causal=True, vocab_size=data.manifest.vocab_size)
    with torch.no_grad():
        network.lm_head.weight.mul_(4)  # sharp, so that samples agree at times
    checkpoint = AutoregressiveCheckpoint(network, data.tokenizer)
    eos = data.tokenizer.eos_token_id
    own = CONFIG.sampler
    assert (own.temperature, own.top_k, own.top_p) == (1.0, 0, 1.0)
    found = brier(writer_of(checkpoint, data.tokenizer, CONFIG)[1], data, CONFIG)

    prefixes = brier_prefixes(data, CONFIG.num_openings, 8)
    exact = []
    for prefix in prefixes:
        p = network.head(network(torch.tensor([prefix.tokens]))[0, -1]).double().softmax(-1)
        # im_end ends a text as the separator does.
        im_end = data.tokenizer.im_end_token_id
        assert im_end is not None
        p[eos] += p[im_end]
        p[im_end] = 0
        exact.append(float(2 * p[prefix.following[0]] - p.square().sum()))
    interval = found.intervals()["brier_1"]
    assert interval is not None
    low, high = interval
    estimate = found.estimates()["brier_1"]
    assert low <= np.mean(exact) <= high
    assert 0 < high - low < 0.1
    assert abs(np.mean(exact)) > 0.02
    assert estimate.count == len(prefixes)
    assert high - low == pytest.approx(2 * 1.96 * estimate.standard_error, rel=0.15)


def test_each_order_is_unbiased(data: PreparedData) -> None:
    """Of two ids that are never right: what is left is less the probability to agree."""
    prefixes = brier_prefixes(data, CONFIG.num_openings, 8)
    met = {token for prefix in prefixes for token in prefix.following}
    a, b = [token for token in range(4, data.manifest.vocab_size) if token not in met][:2]

    def writer(p: float, seed: int) -> list[float]:
        generator = random.Random(seed)

        def sampled(prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
            return [[a if generator.random() < p else b for _ in range(4)] for _ in prompts]

        found = brier(sampled, data, CONFIG)
        return [found.values[name] for name in NAMES]

    p = 0.7
    mean = np.mean([writer(p, seed) for seed in range(30)], axis=0)
    for n, value in enumerate(mean, start=1):
        collisions = sum(
            math.prod(p if kind else 1 - p for kind in text) ** 2
            for text in itertools.product([0, 1], repeat=n)
        )
        error = math.sqrt(collisions * (1 - collisions) / (30 * len(prefixes)))
        assert abs(value + collisions) < 4 * error


def test_a_writer_that_is_right_has_100_and_one_that_is_sure_and_wrong_nothing(
    data: PreparedData,
) -> None:
    prefixes = brier_prefixes(data, CONFIG.num_openings, 8)

    def right(prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        assert num_new == LONGEST
        assert [*prompts] == [prefix.tokens for prefix in prefixes for _ in range(2)]
        return [prefix.following for prefix in prefixes for _ in range(2)]

    def wrong(prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        return [[data.tokenizer.pad_token_id] * 4 for _ in prompts]

    best, worst = brier(right, data, CONFIG), brier(wrong, data, CONFIG)
    assert list(best.values.values()) == pytest.approx([1, 1, 1, 1, 100])
    assert list(worst.values.values()) == pytest.approx([-1, -1, -1, -1, 0])
    # Rows that are all alike say nothing of others: an interval of no width would.
    assert {*best.intervals().values(), *worst.intervals().values()} == {None}
    assert best.less(worst)["brier_lm"].value == pytest.approx(100)
    assert dataclasses.astuple(best.less(best)["brier_2"]) == (0, 0, 0)


def test_the_figures_by_hand(data: PreparedData) -> None:
    """In turn: both samples right; one right in two tokens; both the same and wrong."""
    prefixes = brier_prefixes(data, CONFIG.num_openings, 8)
    pad = data.tokenizer.pad_token_id
    wrong, texts, kinds = [pad] * 4, [], []
    for place, prefix in enumerate(prefixes):
        right = prefix.following
        kind = place % 3 if len(right) == LONGEST else 0
        kinds.append(kind)
        texts += [[right, right], [[*right[:2], pad, pad], wrong[:1] * 3 + [5]], [wrong, wrong]][
            kind
        ]
    found = brier(lambda prompts, num_new: texts, data, CONFIG).values
    both, one, sure = (kinds.count(kind) / len(kinds) for kind in range(3))
    assert min(both, one, sure) > 0.2
    means = [both + one - sure, both + one - sure, both - sure, both - sure]
    assert [found[name] for name in NAMES] == pytest.approx(means)
    if min(means) > 0:
        assert found["brier_lm"] == pytest.approx(100 * math.prod(means) ** 0.25)


def test_prefixes_are_places_of_held_out_rows_whatever_follows(data: PreparedData) -> None:
    few, many = brier_prefixes(data, 5, 3), brier_prefixes(data, 40, 3)
    assert many[: len(few)] == few
    assert len(few) == 15
    eos, seq_len = data.tokenizer.eos_token_id, data.manifest.seq_len
    rows = [data.row(VALIDATION, row)[0].tolist() for row in range(data.num_rows(VALIDATION))]
    for prefix in many:
        assert seq_len // 4 <= len(prefix.tokens) <= seq_len - LONGEST
        assert len(prefix.following) == LONGEST or prefix.following[-1] == eos
        whole = [*prefix.tokens, *prefix.following]
        assert any(row[: len(whole)] == whole for row in rows)
    starts = [data.tokenizer.decode(prefix.following)[:1].isalpha() for prefix in many]
    assert 0 < sum(starts) < len(starts)  # also within words

"""Yardsticks see what the DiT sees, and differences are of the same latents."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cola_train.config.evaluation import InspectionConfig
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.inspection.latent_rows import LatentRows, latent_rows
from cola_train.families.cola.inspection.prior_probes import FlowByPlace, FlowTally
from cola_train.families.cola.inspection.tallies import paired_gain, resampled_means
from cola_train.families.cola.yardsticks.denoisers import (
    Blocks,
    bigram_velocity,
    unigram_velocity,
)
from cola_train.families.cola.yardsticks.reading import Statistics, read_statistics
from cola_train.models.text_vae import Posterior
from tests.helpers.tiny import random_latents, tiny_vae

CHANNELS, SIZE = 4, 4


@pytest.fixture(scope="module")
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


class KnowingDiT:
    """A DiT in place of which a table answers, worse by a given velocity."""

    def __init__(self, known: Statistics, order: str, worse: float) -> None:
        self.known, self.order, self.worse = known, order, worse
        self.config = SimpleNamespace(block_size=SIZE, txt_in_channels=CHANNELS)
        self.rows: LatentRows | None = None

    def velocity(self, z_t: Tensor, history: Tensor, times: Any, *_: Any) -> Tensor:
        assert self.rows is not None
        t, counted = times.distinct[times.index], self.rows.counted
        starts = torch.zeros_like(counted)
        starts[:, 0] = True
        blocks = Blocks.of(z_t, t, self.rows.batch.tokens, starts, counted, SIZE)
        if self.order == "unigram":
            best = unigram_velocity(self.known.codebook, blocks)
        else:
            best = bigram_velocity(self.known.codebook, self.known.bigram, blocks)
        return best.view_as(z_t) + self.worse


def flow_of(data: PreparedData, order: str, worse: float = 0.0) -> FlowByPlace:
    vae: Any = tiny_vae(vocab_size=data.manifest.vocab_size)
    # Codes that depend on tokens alone, as a trained VAE's nearly do.
    codes = random_latents(data.manifest.vocab_size, CHANNELS, seed=2)

    def encode(tokens: Tensor, document: Tensor | None = None) -> Posterior:
        return Posterior(codes[tokens], torch.full_like(codes[tokens], -3.0))

    vae.encode = encode
    with torch.no_grad():
        known = read_statistics(vae, data, None, 8, mask_documents=False)
        dit: Any = KnowingDiT(known, order, worse)
        tally = FlowTally(dit, data.manifest.seq_len, 5, 3, known)
        for rows in latent_rows(vae, data, InspectionConfig(num_rows=40, batch_size=7)):
            dit.rows = rows
            tally.add(rows)
    return tally.result()


def test_a_dit_that_is_a_table_is_told_to_know_as_much(data: PreparedData) -> None:
    for order in ("unigram", "bigram"):
        flow = flow_of(data, order)
        assert flow.yardsticks is not None
        same = dict(flow.yardsticks.items())[order]
        assert same.loss == pytest.approx(flow.loss, rel=1e-6)
        assert same.loss_by_time == pytest.approx(flow.loss_by_time, rel=1e-6)
        assert same.loss_by_block == pytest.approx(flow.loss_by_block, rel=1e-6)
        for found in (same.difference, *same.difference_by_time, *same.difference_by_block):
            assert dataclasses.astuple(found) == pytest.approx((0, 0, 0, 0), abs=1e-9)
    # The last one was a bigram: more than a unigram of the same text.
    unigram, bigram = flow.yardsticks.unigram, flow.yardsticks.bigram
    assert unigram.difference.mean == pytest.approx(bigram.loss - unigram.loss, rel=1e-6)
    assert unigram.difference.high < 0
    assert bigram.loss < unigram.loss < flow.bound
    more, neither = flow.yardsticks.remarks()
    assert more.startswith("The prior knows more than a unigram table: its flow loss less the")
    assert neither.startswith("The prior knows neither more nor less than a bigram table, as far")


def test_what_a_dit_loses_is_said_by_time_block_and_in_all(data: PreparedData) -> None:
    flow = flow_of(data, "unigram", worse=0.5)
    assert flow.yardsticks is not None
    found = flow.yardsticks.unigram
    differences = [found.difference, *found.difference_by_time, *found.difference_by_block]
    losses = [(flow.loss, found.loss)]
    losses += [*zip(flow.loss_by_time, found.loss_by_time)]
    losses += [*zip(flow.loss_by_block, found.loss_by_block)]
    for difference, (dit, table) in zip(differences, losses, strict=True):
        assert difference.mean == pytest.approx(dit - table, rel=1e-4)
        assert difference.low <= difference.mean <= difference.high
    # (e + 1/2)^2 - e^2 = 1/4 + e, and e is 0 on average.
    assert found.difference.mean == pytest.approx(0.25, abs=5 * found.difference.standard_error)
    assert flow.yardsticks.remarks()[0].startswith("The prior knows less than a unigram table")


def test_a_paired_bootstrap_agrees_with_the_error_of_a_ratio_and_leaves_gaps_empty() -> None:
    generator = np.random.default_rng(3)
    counts = generator.integers(1, 30, (200, 3)).astype(float)
    counts[:, 2] = 0
    sums = counts * (1 + generator.normal(size=(200, 3)))
    whole, other, empty = resampled_means(sums, counts)
    mean, error = paired_gain(torch.from_numpy(sums[:, 0]), torch.from_numpy(counts[:, 0]))
    assert whole.mean == pytest.approx(mean)
    assert whole.standard_error == pytest.approx(error, rel=0.1)
    assert whole.high - whole.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert other != whole
    assert np.isnan(dataclasses.astuple(empty)).all()

"""The denoising bound: against closed forms where the best denoiser is known, and on a network that
has learned its text.
"""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.likelihood.likelihood import log_likelihoods
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.denoising_bound import (
    HIGHEST,
    LOWEST,
    PATH_LEVELS,
    latent_rates,
    noise_levels,
    partial_block_rate,
    stratified,
)
from cola_train.likelihood.rows import ScoredRow
from cola_train.models.text_vae import Posterior
from tests.evaluation.likelihood.growing import agreement, error_of, growth, main
from tests.helpers.tiny import calm, tiny_checkpoint, tiny_dit, tiny_vae
from tests.helpers.trained import FIRST, SHARES, chain_texts, trained_checkpoint

CHANNELS = 16


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def posteriors(s: float, share: float, shape: tuple[int, int], seed: int) -> Posterior:
    """q of variance `share` s^2 whose mean is such that q's mean over data is N(0, s^2)."""
    mean = s * math.sqrt(1 - share) * normals(*shape, CHANNELS, seed=seed)
    return Posterior(mean, torch.full_like(mean, math.log(share * s * s)))


def entropy(q: Posterior) -> Tensor:
    return -q.negative_entropy().double()


def cross_entropy(q: Posterior, s: float) -> Tensor:
    """E_q[-log N(z; 0, s^2)] of each latent, nats."""
    square = q.mean.double().square() + q.logvar.double().exp()
    return 0.5 * (math.log(2 * math.pi * s * s) + square / (s * s)).sum(-1)


def gaussian_velocity(s: float) -> Any:
    """That of the best denoiser of N(0, s^2) in each channel."""

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        t = t[..., None]
        z_0 = (1 - t) * s * s / ((1 - t) ** 2 * s * s + t**2) * z_t.double()
        return ((z_t.double() - z_0) / t).float()

    return velocity


def measured(
    s: float, share: float, model: float, rows: int = 512, draws: int = 16
) -> tuple[float, float]:
    """Nats a latent above the closed form of N(0, s^2), and its standard error, by blocks of 1."""
    q = posteriors(s, share, (rows, 8), seed=3)
    rates = []
    for number in range(draws):
        offsets = torch.rand(rows, generator=torch.Generator().manual_seed(number))
        quantiles = stratified(offsets, torch.full((rows,), float(number)), draws, 8)
        z_0 = q.sample(normals(rows, 8, CHANNELS, seed=100 + number))
        noise = normals(rows, 8, CHANNELS, seed=200 + number)
        rates.append(latent_rates(gaussian_velocity(model), q, z_0, noise, quantiles))
    above = torch.stack(rates).mean(0) + entropy(q) - cross_entropy(q, s)
    return float(above.mean()), float(above.std() / above.numel() ** 0.5)


@pytest.mark.parametrize(("share", "largest_error"), [(0.02, 0.1), (0.9, 0.02)])
@pytest.mark.parametrize("s", [1.0, 0.2, 0.105, 0.05])
def test_of_gaussian_latents_it_is_the_closed_form(
    s: float, share: float, largest_error: float
) -> None:
    """However narrow q is: it is never below by more than its interval, and within 0.05 nats."""
    above, error = measured(s, share, model=s)
    assert error < largest_error
    assert -2 * error < above < 0.05 + 2 * error


def test_of_a_denoiser_that_is_wrong_it_is_the_likelihood_of_what_that_takes_data_for() -> None:
    """The best denoiser of N(0, (2 s)^2) is the model N(0, (2 s)^2)."""
    s = 0.2
    above, error = measured(s, 0.5, model=2 * s)
    divergence = CHANNELS * (math.log(2) - 0.5 + 0.5 / 4)
    assert divergence > 5
    assert above == pytest.approx(divergence, abs=0.05 + 3 * error)


def test_levels_weigh_what_their_integral_says() -> None:
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    log_gamma, weight = noise_levels(u)
    assert bool((log_gamma.diff() >= 0).all())
    assert (float(log_gamma[0]), float(log_gamma[-1])) == (
        pytest.approx(LOWEST, abs=0.01),
        HIGHEST,
    )
    axis = torch.linspace(LOWEST, HIGHEST, 20_001, dtype=torch.float64)
    # and once more, of the decoder's mean
    for of in (torch.sigmoid, torch.cos):
        expected = torch.trapezoid(of(axis), axis) + of(torch.tensor(HIGHEST))
        assert float((weight * of(log_gamma)).mean()) == pytest.approx(float(expected), abs=2e-3)


def test_each_block_has_one_level_in_each_part_over_a_rows_draws() -> None:
    offsets = torch.rand(64, generator=torch.Generator().manual_seed(1))
    quantiles = stratified(offsets, torch.arange(64.0), 64, 5)
    for block in quantiles.T:
        gaps = block.sort().values.diff()
        assert float(gaps.max()) < 2 / 64
        assert float(block.min()) >= 0
        assert float(block.max()) < 1
    # A draw's are apart from one another.
    assert float(quantiles.sort(dim=1).values.diff(dim=1).min()) > 0.1


def correlated(rho: float, s: float) -> Tensor:
    """Covariance of four latents, channel by channel."""
    return s * s * (rho + (1 - rho) * torch.eye(4, dtype=torch.float64))


def correlated_velocity(covariance: Tensor) -> Any:
    """That of the best denoiser of a block of latents."""

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        t = t[..., None]
        seen = (1 - t) ** 2 * covariance + t**2 * torch.eye(4, dtype=torch.float64)
        z_0 = (1 - t) * covariance @ torch.linalg.solve(seen, z_t.double())
        return ((z_t.double() - z_0) / t).float()

    return velocity


@pytest.mark.parametrize(("known", "rho"), [(1, 0.0), (3, 0.0), (3, 0.5), (3, 0.9)])
def test_the_known_latents_of_a_block_have_their_own_likelihood(known: int, rho: float) -> None:
    """By the closed form of these alone, whatever the others; the bound costs less than they tell
    of one another.
    """
    s, rows, share = 0.2, 8000, 0.05
    covariance = correlated(rho, s)
    within = covariance[:known, :known]
    # Means of the data less what q spreads.
    spread = torch.linalg.cholesky(within - share * s * s * torch.eye(known))
    mean = (spread @ normals(rows, known, CHANNELS, seed=5).double()).float()
    q = Posterior(mean, torch.full_like(mean, math.log(share * s * s)))
    found, others = partial_block_rate(
        correlated_velocity(covariance),
        q,
        q.sample(normals(rows, known, CHANNELS, seed=6)),
        normals(rows, PATH_LEVELS * 4, CHANNELS, seed=7).unflatten(1, (PATH_LEVELS, 4)),
        torch.rand(rows, generator=torch.Generator().manual_seed(8)).double(),
    )
    # E_q[-log N(z; 0, within)], channel by channel.
    precision = torch.linalg.inv(within)
    square = torch.einsum("nkc,kl,nlc->n", mean.double(), precision, mean.double())
    square = square + CHANNELS * share * s * s * precision.trace()
    truth = 0.5 * (square + CHANNELS * (within.logdet() + known * math.log(2 * math.pi)))
    above = found + entropy(q).sum(1) - truth
    error = float(above.std()) / rows**0.5
    rest = covariance[known:, known:]
    information = 0.5 * CHANNELS * (within.logdet() + rest.logdet() - covariance.logdet())
    assert error < 0.15
    assert -2 * error < float(above.mean()) < 0.05 * known + 0.6 * float(information) + 2 * error
    assert others.shape == (rows, 4 - known, CHANNELS)


# On a network that has learned its text

TEXTS = chain_texts(6, 24, seed=123_456)


@pytest.fixture(scope="module")
def trained() -> ColaCheckpoint:
    return trained_checkpoint(steps=120)


CONFIG = LikelihoodConfig(batch_size=256, num_samples=64)


def test_few_draws_and_many_agree_within_their_interval(trained: ColaCheckpoint) -> None:
    texts = TEXTS[:, :23].tolist()
    few, many, apart = agreement(trained, texts, 64, 512, CONFIG)
    assert float(np.abs(apart).max()) < 3
    assert abs(float(apart.mean())) < 1
    # With eight times as many draws the error is a third.
    errors = [np.mean([error_of(one) for one in found]) for found in (few, many)]
    assert errors[0] / errors[1] == pytest.approx(8**0.5, rel=0.3)


def test_no_text_is_less_likely_than_one_that_it_begins(trained: ColaCheckpoint) -> None:
    found, error = growth(trained, TEXTS.tolist(), range(17, 25), CONFIG)
    assert float((found + 2 * error).min()) > 0
    assert float(found.mean()) > 0.5
    # No block is dearer to begin than to fill, on average.
    assert float(found.mean(0).min()) > 0


def test_what_a_token_adds_is_the_difference_of_two_texts(trained: ColaCheckpoint) -> None:
    texts = TEXTS[:2].tolist()
    found, _ = growth(trained, texts, range(17, 21), CONFIG)
    rows = [ScoredRow(text[:length], key) for key, text in enumerate(texts) for length in (16, 20)]
    one, two, three, four = (row.log_p for row in log_likelihoods(trained, rows, CONFIG))
    assert found.sum(1).tolist() == pytest.approx([one - two, three - four], rel=1e-5)


def test_the_program_says_what_it_finds_of_a_checkpoint(
    prepared_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = PreparedData.open(prepared_folder).tokenizer
    vae, dit = calm(tiny_vae(vocab_size=320)), calm(tiny_dit())
    dataclasses.replace(tiny_checkpoint(vae, dit), tokenizer=tokenizer).save(tmp_path / "tiny")
    few = ["--texts", "3", "--agreeing", "2", "--draws", "4", "--first", "6", "--last", "8"]
    assert main([str(tmp_path / "tiny"), "--data", str(prepared_folder), *few]) in (0, 1)
    first, second, apart, growing = capsys.readouterr().out.splitlines()
    assert first.startswith("64 draws: ")
    assert second.startswith("512 draws: ")
    assert apart.startswith("2 texts of 8 tokens; difference over its standard error: mean ")
    assert growing.startswith("3 texts from 6 to 8 tokens, 4 draws: a token adds ")
    assert " of 6, by more than the 95 % interval: " in growing


def test_it_is_above_what_the_chain_itself_is_worth(trained: ColaCheckpoint) -> None:
    """No model has fewer nats on average than the text has, log 23 and the entropy of the shares
    for each word after the first.
    """
    truth = []
    for text in (TEXTS - FIRST).tolist():
        choices = [(after - 5 * word - 1) % 23 for word, after in itertools.pairwise(text)]
        truth.append(math.log(23) - sum(math.log(float(SHARES[choice])) for choice in choices))
    rows = [ScoredRow(text, key) for key, text in enumerate(TEXTS.tolist())]
    found = log_likelihoods(trained, rows, CONFIG)
    assert all(-one.log_p > least for one, least in zip(found, truth, strict=True))
    whole = dataclasses.astuple(found[0])
    assert found[0].log_p == pytest.approx(sum(whole[4:7]))

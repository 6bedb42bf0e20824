"""Closed forms against torch.distributions and against averages over draws."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cola_train.models.text_vae import Posterior
from tests.helpers.compare import assert_near
from tests.helpers.tiny import random_latents

SHAPE = (2, 3, 4)


@pytest.fixture
def posterior() -> Posterior:
    return Posterior(random_latents(*SHAPE, seed=60), random_latents(*SHAPE, seed=61))


@pytest.fixture
def other() -> Posterior:
    return Posterior(random_latents(*SHAPE, seed=62), 0.5 * random_latents(*SHAPE, seed=63))


def as_normal(posterior: Posterior) -> Normal:
    return Normal(posterior.mean, torch.exp(posterior.logvar / 2))


def assert_mean_of_draws(draws: Tensor, expected: Tensor) -> None:
    """The mean over the first axis within 5 standard errors, which are small beside what is
    estimated.
    """
    error = draws.std(0) / len(draws) ** 0.5
    assert (error < 0.1).all()
    assert ((draws.mean(0) - expected).abs() < 5 * error).all()


def test_closed_forms_equal_torch_distributions(posterior: Posterior, other: Posterior) -> None:
    standard = Normal(torch.zeros(SHAPE), torch.ones(SHAPE))
    assert_near(
        posterior.kl_to_standard_normal(), kl_divergence(as_normal(posterior), standard).sum(-1)
    )
    assert_near(
        posterior.kl_to(other), kl_divergence(as_normal(posterior), as_normal(other)).sum(-1)
    )
    assert_near(posterior.negative_entropy(), -as_normal(posterior).entropy().sum(-1))
    assert_near(posterior.kl_to(posterior), torch.zeros(SHAPE[:2]))
    # KL(q || p) = E_q[log q] - E_q[log p]: the terms of the two stages fit together.
    cross_entropy = 0.5 * (
        posterior.mean.square() + posterior.logvar.exp() + torch.log(torch.tensor(2 * torch.pi))
    ).sum(-1)
    assert_near(posterior.kl_to_standard_normal(), posterior.negative_entropy() + cross_entropy)


def test_closed_forms_equal_averages_over_draws(posterior: Posterior, other: Posterior) -> None:
    eps = random_latents(20_000, *SHAPE, seed=64)
    z = torch.stack([posterior.sample(e) for e in eps[:1]])
    assert_near(z[0], posterior.mean + posterior.logvar.exp().sqrt() * eps[0])
    z = posterior.mean + posterior.logvar.exp().sqrt() * eps
    log_q = as_normal(posterior).log_prob(z).sum(-1)
    log_other = as_normal(other).log_prob(z).sum(-1)
    log_standard = Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert_mean_of_draws(log_q, posterior.negative_entropy())
    assert_mean_of_draws(log_q - log_standard, posterior.kl_to_standard_normal())
    assert_mean_of_draws(log_q - log_other, posterior.kl_to(other))


@pytest.mark.parametrize("log_snr", [1.0, 1.5, 2.0, -1.0])
def test_a_fixed_log_snr_is_met(log_snr: float) -> None:
    mean = random_latents(*SHAPE, seed=65)
    mean = mean / mean.square().mean(-1, keepdim=True).sqrt()  # as the encoder gives it
    fixed = Posterior(mean, torch.zeros(SHAPE)).with_log_snr(log_snr)
    assert_near(
        torch.log(fixed.mean.square().mean() / fixed.logvar.exp().mean()), torch.tensor(log_snr)
    )
    assert torch.equal(fixed.mean, mean)
    assert fixed.logvar.unique().numel() == 1

"""ELBO and IWAE's bound on a Gaussian latent model, where log p(x) and the ELBO's gap are known in
closed form.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.families.cola.likelihood import log_density
from cola_train.likelihood.importance import LogWeights, elbo, iwae, log_weights
from tests.helpers.gaussian import GaussianModel, gaussian_model


@pytest.fixture(scope="module")
def gaussian() -> GaussianModel:
    return gaussian_model(seed=3)


def gaussian_weights(
    model: GaussianModel, count: int, spread: float, hutchinson: bool = False
) -> LogWeights:
    """As `count` draws from a posterior that is wider than it should be by `spread`, the prior by
    its ODE.
    """
    generator = torch.Generator().manual_seed(11)
    eps = torch.randn(count, 1, 3, generator=generator, dtype=torch.float64)
    probe = (
        2.0 * torch.randint(0, 2, (count, 1, 3), generator=generator).double() - 1
        if hutchinson
        else None
    )
    config = LikelihoodConfig(num_steps=48)

    def log_prior(z_0: Tensor) -> Tensor:
        return log_density(model.prior.velocity, z_0, config, probe).sum(1)

    return log_weights(model.posterior(count, spread), eps, model.log_likelihood, log_prior)


@pytest.mark.parametrize("hutchinson", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1.7])
def test_the_elbo_is_below_log_p_by_the_posteriors_divergence(
    gaussian: GaussianModel, spread: float, hutchinson: bool
) -> None:
    log_w = gaussian_weights(gaussian, 8000, spread, hutchinson).total
    gap = gaussian.gap(gaussian.posterior(1, spread))
    assert gap > 0.2
    assert (
        abs(float(elbo(log_w)) - (gaussian.log_evidence() - gap))
        < 4 * float(log_w.std()) / 8000**0.5 + 0.005
    )


def test_with_the_true_posterior_every_weight_is_the_evidence(gaussian: GaussianModel) -> None:
    # Of independent channels, so that the true posterior is diagonal too.
    spread = torch.tensor([0.4, 1.0, 2.0], dtype=torch.float64)
    model = dataclasses.replace(
        gaussian,
        prior=dataclasses.replace(gaussian.prior, covariance=torch.diag(spread)),
        loading=torch.tensor([[1.3, 0, 0], [0, 0.7, 0]], dtype=torch.float64),
    )
    log_w = gaussian_weights(model, 200, spread=1.0).total
    assert torch.allclose(log_w, torch.full_like(log_w, model.log_evidence()), atol=5e-3)


def test_iwae_rises_with_k_towards_log_p(gaussian: GaussianModel) -> None:
    log_w = gaussian_weights(gaussian, 16384, spread=1.7).total
    truth = gaussian.log_evidence()
    counts = [1, 2, 4, 16, 128, 1024]
    # Groups of K of the same draws: the standard error of their mean bound.
    groups = [iwae(log_w.reshape(-1, count)) for count in counts]
    means = [float(group.mean()) for group in groups]
    errors = [float(group.std() / len(group) ** 0.5) for group in groups]
    assert means[0] == pytest.approx(float(elbo(log_w)))
    # The same draws make the next bound: it is higher beyond chance until nothing is left to gain.
    assert all(larger > smaller for smaller, larger in itertools.pairwise(means))
    assert means[3] - means[0] > 10 * errors[0]
    assert abs(means[-1] - truth) < 4 * errors[-1] + 0.005
    for mean, error in zip(means, errors, strict=True):
        assert mean < truth + 4 * error + 0.005


def test_iwae_from_hutchinsons_estimate_is_too_much_by_what_its_noise_says(
    gaussian: GaussianModel,
) -> None:
    # The Jacobian is the same everywhere, so the estimate's error is independent of z_0, and e^T M
    # e - tr M takes four values.
    log_w = gaussian_weights(gaussian, 16384, spread=1.0, hutchinson=True).total
    values, vectors = torch.linalg.eigh(gaussian.prior.covariance)
    integral = vectors @ torch.diag(-0.5 * values.log()) @ vectors.T
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    errors = torch.einsum("pi,ij,pj->p", probes, integral, probes) - integral.trace()
    excess = float(torch.logsumexp(errors, 0)) - math.log(len(errors))
    assert excess > 0.2
    assert float(iwae(log_w)) == pytest.approx(gaussian.log_evidence() + excess, abs=0.06)

"""The codes of a VAE, and what is known of a latent by Bayes, against integrals on a grid."""

import torch

from cola_train.families.cola.yardsticks.codebook import CodeTally
from cola_train.flow import gaussian_baseline
from cola_train.models.codebook import Codebook
from cola_train.models.text_vae import Posterior
from tests.helpers.tiny import random_latents


def test_a_denoised_latent_is_the_mean_of_all_that_could_have_been_noised() -> None:
    codes = torch.tensor([[-1.0], [0.3], [2.0]], dtype=torch.float64)
    log_p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    variance = torch.tensor([0.05], dtype=torch.float64)
    codebook = Codebook(codes, log_p, variance)
    z_t = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64)
    density = (log_p - (grid[:, None] - codes[:, 0]).square() / (2 * variance)).exp().sum(1)
    for time in (0.05, 0.4, 0.9):
        t = torch.full((25,), time, dtype=torch.float64)
        # p(z_0) p(z_t | z_0) over all z_0
        weights = density * (-(z_t - (1 - time) * grid).square() / (2 * time**2)).exp()
        expected = (weights * grid).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        assert torch.allclose(codebook.denoise(z_t, t, log_p[None]), expected, atol=1e-9)
        code = codebook.mean_code(z_t, t, log_p[None])
        assert torch.allclose(codebook.velocity(z_t, t, code), (z_t - expected) / time, atol=1e-7)


def test_likelihoods_are_those_of_normals_up_to_a_constant_of_the_latent() -> None:
    codes, z_t = random_latents(6, 3, seed=1).double(), random_latents(5, 3, seed=2).double()
    variance, t = torch.tensor([0.1, 0.4, 1.5]).double(), torch.linspace(0, 1, 5).double()
    found = Codebook(codes, torch.zeros(6).double(), variance).log_likelihood(z_t, t)
    for latent in range(5):
        covariance = torch.diag((1 - t[latent]) ** 2 * variance + t[latent] ** 2)
        normal = torch.distributions.MultivariateNormal((1 - t[latent]) * codes, covariance)
        rest = found[latent] - normal.log_prob(z_t[latent])
        assert torch.allclose(rest, rest[:1].expand(6), atol=1e-9)


def test_velocities_are_finite_at_either_end_of_the_path() -> None:
    codebook = Codebook(random_latents(6, 3, seed=1), torch.zeros(6), torch.full((3,), 1e-4))
    z = random_latents(2, 3, seed=2)
    at_data, at_noise = (
        codebook.velocity(z, t, codebook.mean_code(z, t, codebook.log_p[None]))
        for t in (torch.zeros(2), torch.ones(2))
    )
    # Without noise z_0 is seen and z_1 is anything; all noise is z_1, and z_0 anything.
    assert torch.allclose(at_data, -z, atol=1e-5)
    assert torch.allclose(at_noise, z - codebook.codes.mean(0), atol=1e-5)


def test_one_code_is_the_predictor_that_knows_mean_and_variance() -> None:
    variance = torch.tensor([0.3, 2.0], dtype=torch.float64)
    codebook = Codebook(torch.zeros(1, 2).double(), torch.zeros(1).double(), variance)
    t = torch.tensor([0.02, 0.5, 0.97], dtype=torch.float64)
    slope = codebook.velocity(torch.ones(3, 2).double(), t, torch.zeros(3, 2).double())
    t = t[:, None]
    # E (slope z_t - u)^2 in closed form
    spread, shared = (1 - t) ** 2 * variance + t**2, t - (1 - t) * variance
    loss = slope.square() * spread - 2 * slope * shared + 1 + variance
    assert abs(float(loss.mean()) - gaussian_baseline(variance, t[:, 0])) < 1e-12


def test_codes_and_spreads_of_a_known_vae_are_found_whatever_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = random_latents(5, 2, seed=3).double()
    tokens = torch.randint(0, 4, (40, 50), generator=generator)  # 4 is never seen
    counted = torch.rand(40, 50, generator=generator) < 0.9
    spread, noise = torch.tensor([0.02, 0.3]).double(), torch.tensor([0.04, 0.25]).double()
    mean = codes[tokens] + spread * torch.randn(40, 50, 2, generator=generator).double()
    mean[~counted] = 1e6  # padding
    posterior = Posterior(mean, noise.log().expand_as(mean))
    whole, parts = CodeTally(5, 2), CodeTally(5, 2)
    whole.add(tokens, posterior, counted)
    for row in range(40):
        at = slice(row, row + 1)
        parts.add(tokens[at], Posterior(mean[at], posterior.logvar[at]), counted[at])
    for name in ("codes", "within", "posterior"):
        assert torch.allclose(getattr(whole, name), getattr(parts, name), rtol=1e-9)
    # Standard errors are spread / sqrt(450) and 5 % of a variance.
    assert ((whole.codes - codes)[:4].abs() < 4 * spread / 450**0.5).all()
    assert torch.allclose(whole.within, spread.square(), rtol=0.15)
    assert torch.allclose(whole.posterior, noise)
    assert whole.count.tolist()[4] == 0
    assert torch.equal(whole.codes[4], torch.zeros(2).double())

"""A latent model that is Gaussian throughout, so that its flow, its densities and log p(x) are
known in closed form.
"""

import dataclasses
import math

import torch
from torch import Tensor

from cola_train.models.text_vae import Posterior


@dataclasses.dataclass(frozen=True)
class GaussianFlow:
    """z_0 ~ N(mean, covariance); its optimal velocity E[z_1 - z_0 | z_t] along the straight path to
    N(0, I) is linear in z_t.
    """

    mean: Tensor
    covariance: Tensor

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """z_t has mean (1 - t) m and covariance C = (1 - t)^2 S + t^2 I, covariance t I with z_1
        and (1 - t) S with z_0.
        """
        slope = self.slope(t)
        return (z - (1 - t) * self.mean) @ slope.T - self.mean

    def slope(self, t: Tensor) -> Tensor:
        """The velocity's Jacobian, the same everywhere."""
        identity = torch.eye(len(self.mean), dtype=torch.float64)
        covariance = (1 - t) ** 2 * self.covariance + t**2 * identity
        return (t * identity - (1 - t) * self.covariance) @ torch.linalg.inv(covariance)


@dataclasses.dataclass(frozen=True)
class GaussianModel:
    """z_0 ~ N(m, S), x = A z_0 + noise of covariance R, and a posterior that is not quite the true
    one.
    """

    prior: GaussianFlow
    loading: Tensor
    noise: Tensor
    x: Tensor

    def log_evidence(self) -> float:
        """log p(x) = log N(x; A m, A S A^T + R)."""
        covariance = self.loading @ self.prior.covariance @ self.loading.T + self.noise
        return float(log_normal(self.x, self.loading @ self.prior.mean, covariance))

    def log_likelihood(self, z_0: Tensor) -> Tensor:
        """log p(x | z_0) of z_0 (draws, 1, channels)."""
        return log_normal(
            self.x - z_0[:, 0].double() @ self.loading.T, torch.zeros_like(self.x), self.noise
        )

    def true_posterior(self) -> tuple[Tensor, Tensor]:
        """Mean and covariance of p(z_0 | x)."""
        precision = (
            torch.linalg.inv(self.prior.covariance)
            + self.loading.T @ torch.linalg.inv(self.noise) @ self.loading
        )
        covariance = torch.linalg.inv(precision)
        pulled = (
            torch.linalg.inv(self.prior.covariance) @ self.prior.mean
            + self.loading.T @ torch.linalg.inv(self.noise) @ self.x
        )
        return covariance @ pulled, covariance

    def posterior(self, draws: int, spread: float = 1.0) -> Posterior:
        """The true posterior's mean and, times `spread`, the variances that a diagonal Gaussian
        nearest to it has.
        """
        mean, covariance = self.true_posterior()
        variance = spread / torch.linalg.inv(covariance).diagonal()
        shape = (draws, 1, len(mean))
        return Posterior(mean.expand(shape), variance.log().expand(shape))

    def gap(self, posterior: Posterior) -> float:
        """KL(q || p(z_0 | x)), by which the ELBO is below log p(x)."""
        mean, covariance = self.true_posterior()
        variance = posterior.logvar[0, 0].exp()
        inverse = torch.linalg.inv(covariance)
        distance = posterior.mean[0, 0] - mean
        trace = (inverse.diagonal() * variance).sum()
        return 0.5 * float(
            trace
            + distance @ inverse @ distance
            - len(mean)
            + torch.logdet(covariance)
            - variance.log().sum()
        )


def gaussian_flow(size: int, seed: int) -> GaussianFlow:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return GaussianFlow(
        torch.randn(size, generator=generator, dtype=torch.float64),
        root @ root.T + 0.2 * torch.eye(size).double(),
    )


def gaussian_model(seed: int) -> GaussianModel:
    """Three latent channels, two observed ones."""
    generator = torch.Generator().manual_seed(seed)
    loading, x = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 3), (2,))
    )
    return GaussianModel(gaussian_flow(3, seed), loading, 0.5 * torch.eye(2).double(), x)


def log_normal(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """log N(x; mean, covariance) over the last dimension of x."""
    distance = x - mean
    square = (distance * torch.linalg.solve(covariance, distance.unsqueeze(-1)).squeeze(-1)).sum(-1)
    return -0.5 * (square + torch.logdet(covariance) + len(mean) * math.log(2 * math.pi))

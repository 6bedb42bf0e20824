"""The diagonal Gaussian q_phi(z0 | x) over normalized latents: draw, entropy, divergences, nats."""

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Tensor

LOG_VARIANCE_RANGE = (-30.0, 20.0)
Latents = Float[Tensor, "batch latents channels"]
Nats = Float[Tensor, "batch latents"]


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Mean and log-variance per latent position and channel."""

    mean: Latents
    logvar: Latents

    def sample(self, eps: Latents) -> Latents:
        """z_0 = mean + std * eps, with eps from N(0, I)."""
        return self.mean + torch.exp(0.5 * self.logvar) * eps

    def with_log_snr(self, log_snr: float) -> "Posterior":
        """With a fixed logSNR: sigma^2 = exp(-logSNR), since E[mu^2] = 1 (method, section 1)."""
        return Posterior(self.mean, torch.full_like(self.logvar, -log_snr))

    def kl_to_standard_normal(self) -> Nats:
        """KL(q || N(0, I)), summed over channels."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)

    def kl_to(self, other: "Posterior") -> Nats:
        """KL(q || other), closed form, summed over channels."""
        ratio = torch.exp(self.logvar - other.logvar)
        distance = (self.mean - other.mean).square() * torch.exp(-other.logvar)
        return 0.5 * (ratio + distance - 1 + other.logvar - self.logvar).sum(-1)

    def negative_entropy(self) -> Nats:
        """E_q[log q], closed form, summed over channels."""
        return -0.5 * (1 + math.log(2 * math.pi) + self.logvar).sum(-1)

"""Latents as codes: what a latent would be if nothing but its token were known of it.

z_0 = c_k + s for token k, s ~ N(0, S) with a diagonal S; then z_t = (1 - t) z_0 + t z_1 is
N((1 - t) c_k, V), V = (1 - t)^2 S + t^2, and everything that a denoiser could know by Bayes is in
closed form.
"""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from cola_train.flow import mean_velocity

NoisedLatents = Float[Tensor, "latents channels"]
NoiseTimes = Float[Tensor, " latents"]


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A code for each of K tokens, how likely each token is, and the spread around a code.

    One code, with the mean and variance of all latents, is the Gaussian yardstick.
    """

    codes: Float[Tensor, "codes channels"]
    log_p: Float[Tensor, " codes"]  # of a token of which nothing is known, in nats
    variance: Float[Tensor, " channels"]  # S, above 0

    def to(self, device: torch.device, dtype: torch.dtype) -> "Codebook":
        """This codebook elsewhere."""
        parts = (self.codes, self.log_p, self.variance)
        return Codebook(*(part.to(device, dtype) for part in parts))

    def log_likelihood(self, z_t: NoisedLatents, t: NoiseTimes) -> Float[Tensor, "latents codes"]:
        """log p(z_t | token) in nats, up to a constant of each latent; t in [0, 1]."""
        scaled = (1 - t)[:, None] / self._noised_variance(t)
        # -(z - (1 - t) c)^2 / 2V without z^2: two products, and no tensor of all three sizes.
        features = torch.cat([scaled * z_t, -0.5 * (1 - t)[:, None] * scaled], dim=1)
        return features @ torch.cat([self.codes, self.codes.square()], dim=1).T

    def mean_code(
        self, z_t: NoisedLatents, t: NoiseTimes, log_prior: Float[Tensor, "#latents codes"]
    ) -> NoisedLatents:
        """E[c_k | z_t] where `log_prior` (nats, need not be normalized) is known of the token."""
        return (self.log_likelihood(z_t, t) + log_prior).softmax(-1) @ self.codes

    def velocity(self, z_t: NoisedLatents, t: NoiseTimes, code: NoisedLatents) -> NoisedLatents:
        """v* = E[z_1 - z_0 | z_t] = (z_t - E[z_0 | z_t]) / t, given `code` = E[c_k | z_t].

        E[z_0 | z_t, k] = c_k + (1 - t) S / V (z_t - (1 - t) c_k) is linear in c_k, so the mean code
        is all that is needed; in this form nothing is divided by t.
        """
        return mean_velocity(z_t, t[:, None], code, self.variance)[0]

    def denoise(
        self, z_t: NoisedLatents, t: NoiseTimes, log_prior: Float[Tensor, "#latents codes"]
    ) -> NoisedLatents:
        """E[z_0 | z_t], `log_prior` as in `mean_code`."""
        velocity = self.velocity(z_t, t, self.mean_code(z_t, t, log_prior))
        return z_t - t[:, None] * velocity

    def _noised_variance(self, t: NoiseTimes) -> NoisedLatents:
        return (1 - t)[:, None].square() * self.variance + t[:, None].square()

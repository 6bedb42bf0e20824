"""log p(x) by importance sampling of latents: ELBO, IWAE (method, section 7; Burda et al. 2016)."""

import dataclasses
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cola_train.models.text_vae import Posterior


@dataclasses.dataclass(frozen=True)
class LogWeights:
    """log w = log p(x | z_0) + log p(z_0) - log q(z_0 | x) in its three parts, nats, float64.

    `step_change` is what twice as many steps of the solver that found log p(z_0) add to it; None
    where none with a number of steps did.
    """

    reconstruction: Float64[Tensor, "*draws"]  # log p(x | z_0)
    prior: Float64[Tensor, "*draws"]  # log p(z_0)
    entropy: Float64[Tensor, "*draws"]  # -log q(z_0 | x)
    step_change: Float64[Tensor, "*draws"] | None = None

    @property
    def total(self) -> Float64[Tensor, "*draws"]:
        """log w."""
        return self.reconstruction + self.prior + self.entropy


def log_weights(
    posterior: Posterior,
    eps: Float[Tensor, "draws latents channels"],
    log_likelihood: Callable[[Float[Tensor, "draws latents channels"]], Float64[Tensor, " draws"]],
    log_prior: Callable[[Float[Tensor, "draws latents channels"]], Float64[Tensor, " draws"]],
) -> LogWeights:
    """The weight of one draw z_0 = mean + std * eps from the posterior q(z_0 | x) of each row."""
    z_0 = posterior.sample(eps)
    entropy = eps.double().square() + posterior.logvar.double() + math.log(2 * math.pi)
    return LogWeights(log_likelihood(z_0), log_prior(z_0), 0.5 * entropy.sum((1, 2)))


def elbo(log_w: Float64[Tensor, "*rows draws"]) -> Float64[Tensor, "*rows"]:
    """The mean of log w over a row's draws: a lower bound of log p(x) in expectation."""
    return log_w.mean(-1)


def iwae(log_w: Float64[Tensor, "*rows draws"]) -> Float64[Tensor, "*rows"]:
    """log of the mean of w over a row's K draws: in expectation rises with K up to log p(x).

    It needs log p(z_0) itself. With Hutchinson's unbiased estimate, of error e, it rises up to
    log p(x) + log E[exp(e)] instead, too high by about Var(e) / 2; the ELBO is not affected.
    """
    return torch.logsumexp(log_w, -1) - math.log(log_w.shape[-1])

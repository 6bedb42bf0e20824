"""The straight path between data and noise, and the project's one time convention.

t is in [0, 1]: t = 0 is data, t = 1 is noise (much of the field has it the other way round). z_t = (1 - t) z_0 + t z_1, so the
velocity dz/dt = z_1 - z_0 points from data to noise, and sampling integrates it backwards, from t = 1 to 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def interpolate(z_0: Float[Tensor, "*shape"], z_1: Float[Tensor, "*shape"], t: Float[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """z_t = (1 - t) z_0 + t z_1."""
    return (1 - t) * z_0 + t * z_1


def velocity_target(z_0: Float[Tensor, "*shape"], z_1: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """u = z_1 - z_0, the velocity of the straight path."""
    return z_1 - z_0


def logit_normal_time(normal: Float[Tensor, "*shape"], loc: float, scale: float) -> Float[Tensor, "*shape"]:
    """t = sigmoid(loc + scale * normal) for a standard normal draw; the headline run has loc = scale = 1."""
    return torch.sigmoid(loc + scale * normal)


def schedule(num_steps: int) -> list[float]:
    """The sampler's times: num_steps + 1 of them, evenly from 1 to 0."""
    return [1 - step / num_steps for step in range(num_steps + 1)]


def euler_step(z_t: Float[Tensor, "*shape"], velocity: Float[Tensor, "*shape"], t: float, t_next: float) -> Float[Tensor, "*shape"]:
    """One Euler step from t to t_next < t."""
    return z_t - (t - t_next) * velocity


def guide(
    conditional: Float[Tensor, "*shape"], unconditional: Float[Tensor, "*shape"], scale: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """Classifier-free guidance: v_uncond + g (v_cond - v_uncond); g = 1 is the conditional branch alone."""
    return unconditional + scale * (conditional - unconditional)


def mean_variance_bound(variance: Float[Tensor, " channels"], t: Float[Tensor, " draws"]) -> float:
    """The flow-matching loss of the best predictor that knows only each channel's mean and variance s^2.

    For independent z_0 of variance s^2 and z_1 of variance 1, the best linear prediction of u = z_1 - z_0 from z_t leaves
    Var(u) - Cov(u, z_t)^2 / Var(z_t) = s^2 / ((1 - t)^2 s^2 + t^2); the bound is its mean over channels and over `t`.
    A Gaussian z_0 makes the linear prediction the best of all. A model below the bound has learned more than two moments.
    """
    s2, t = variance.double()[None, :], t.double()[:, None]
    return float((s2 / ((1 - t) ** 2 * s2 + t**2)).mean())

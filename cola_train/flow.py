"""The straight path between data and noise, and the project's one time convention.

t is in [0, 1]: t = 0 is data, t = 1 is noise (much of the field has it the other way round). z_t =
(1 - t) z_0 + t z_1, so the velocity dz/dt = z_1 - z_0 points from data to noise, and sampling
integrates it backwards, from t = 1 to 0.
"""

import functools
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cola_train.config.sampling import Solver
from cola_train.solvers import solver_steps

Values = Float[Tensor, "*shape"]
Broadcast = Float[Tensor, "*#shape"]


def interpolate(z_0: Values, z_1: Values, t: Broadcast) -> Values:
    """z_t = (1 - t) z_0 + t z_1."""
    return (1 - t) * z_0 + t * z_1


def velocity_target(z_0: Values, z_1: Values) -> Values:
    """u = z_1 - z_0, the velocity of the straight path."""
    return z_1 - z_0


def mean_velocity(
    z_t: Values, t: Broadcast, mean: Broadcast, variance: Broadcast
) -> tuple[Values, Broadcast]:
    """E[z_1 - z_0 | z_t] and the variance around it, where z_0 is N(mean, variance).

    With V = (1 - t)^2 variance + t^2 the mean is slope (z_t - (1 - t) mean) - mean, slope =
    (t - (1 - t) variance) / V, and the variance is variance / V; nothing is divided by t.
    """
    noised = (1 - t).square() * variance + t.square()
    slope = (t - (1 - t) * variance) / noised
    return slope * (z_t - (1 - t) * mean) - mean, variance / noised


def logit_normal_time(normal: Values, loc: float, scale: float) -> Values:
    """t = sigmoid(loc + scale * normal), normal ~ N(0, 1); in the headline run loc = scale = 1."""
    return torch.sigmoid(loc + scale * normal)


def euler_step(z_t: Values, velocity: Values, t: float, t_next: float) -> Values:
    """One Euler step from t to t_next < t."""
    return z_t - (t - t_next) * velocity


def integrate(
    velocity: Callable[[Tensor, int], Tensor], z_1: Values, num_steps: int, solver: Solver
) -> Values:
    """Integrate dz/dt = velocity(z, place) from z_1 at t = 1 to t = 0; `place` indexes `time_grid`.

    What each solver does is in solvers.py.
    """
    z, past = z_1, list[Tensor]()
    for place, step in enumerate(solver_steps(solver, num_steps)):
        now = velocity(z, place)
        past = [now, *past][: len(step.weights)]
        if step.is_heun:
            slope = (now + velocity(euler_step(z, now, step.t, step.t_next), place + 1)) / 2
        else:
            slope = functools.reduce(
                torch.add, (weight * v for weight, v in zip(step.weights, past, strict=True))
            )
        z = euler_step(z, slope, step.t, step.t_next)
    return z


def guide(conditional: Values, unconditional: Values, scale: Broadcast) -> Values:
    """Classifier-free guidance: v_uncond + g (v_cond - v_uncond); g = 1 is conditional alone."""
    return unconditional + scale * (conditional - unconditional)


def rescale_guided(
    guided: Float[Tensor, "batch seq channels"],
    conditional: Float[Tensor, "batch seq channels"],
    counted: Bool[Tensor, "batch seq"],
    share: float,
) -> Float[Tensor, "batch seq channels"]:
    """guided (share std(conditional) / std(guided) + 1 - share) (Lin et al. 2024, eqs. 15, 16).

    Guidance rescaling. Standard deviations are of each row, over the channels of its `counted`
    positions; guidance makes them too large.
    """
    ratio = _deviation(conditional, counted) / _deviation(guided, counted)
    return guided * (share * ratio + (1 - share))


def _deviation(x: Tensor, counted: Tensor) -> Tensor:
    weight = counted[..., None].to(x.dtype)
    count = weight.sum((1, 2), keepdim=True) * x.shape[-1]
    mean = (x * weight).sum((1, 2), keepdim=True) / count
    variance = ((x - mean).square() * weight).sum((1, 2), keepdim=True) / count
    # Numerator and denominator of the ratio have the same bound: it only keeps a constant block
    # from 0 / 0.
    return variance.sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def gaussian_baseline(variance: Float[Tensor, " channels"], t: Float[Tensor, " draws"]) -> float:
    """Flow-matching loss of the best predictor that knows each channel's mean and variance alone.

    For independent z_0 of variance s^2 and z_1 of variance 1, the best linear prediction of
    u = z_1 - z_0 from z_t leaves Var(u) - Cov(u, z_t)^2 / Var(z_t) = s^2 / ((1 - t)^2 s^2 + t^2);
    this is its mean over channels and `t`. A Gaussian z_0 makes the linear prediction the best of
    all. A model below this bound has learned more than two moments.
    """
    s2, t = variance.double()[None, :], t.double()[:, None]
    return float((s2 / ((1 - t) ** 2 * s2 + t**2)).mean())

"""A bound on KL(q(z_0 | x) || p(z_0)) by the DiT's denoising errors, without a solver.

At the noise level gamma = ((1 - t) / t)^2 a latent is seen as y = z_t / (1 - t) = z_0 + noise of
variance 1 / gamma, and x(y) = z_t - t v is what the DiT takes z_0 for. The model p is the diffusion
that these estimates drive, from noise (gamma = 0) to data; by Girsanov's theorem, for *any* x,

    KL(q || p) <= 1/2 integral over gamma of E_q |E_q[z_0 | y] - x(y)|^2

with equality where x is the posterior mean under p (Kingma et al. 2021; Kong et al. 2023,
Information-Theoretic Diffusion). q is Gaussian, so E_q[z_0 | y] is known. Hence
E_q[-log p(z_0)] <= entropy of q + that; the entropy form of I-MMSE is its mean over q = data.

Below `LOWEST` the model denoises as if z_0 ~ N(0, I), a model like any other. At `HIGHEST`, where
the noise is far below a posterior's own, it ends in a decoder: z_0 ~ N(x(y), 1 / gamma). Both ends
are then known in closed form but for that decoder's mean, whose error is one more level to draw; so
the sum stays a bound. It is the looser, the nearer a posterior's log variance comes to -HIGHEST: a
latent of 16 channels costs 0.01 nats at a log SNR of 6, 0.06 at 7, 0.36 at 8.
"""

import itertools
import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cola_train.families.cola.transport import clean_attention
from cola_train.flow import interpolate
from cola_train.models.attention.cached import CachedAttention
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.models.text_vae import Documents, Latents, Posterior

# Log noise levels, and the share of draws below each: most lie where a token is told from others.
_KNOTS = ((-12.0, 0.0), (-3.0, 0.03), (-1.0, 0.15), (3.0, 0.65), (9.0, 0.93))
LOWEST, HIGHEST = _KNOTS[0][0], _KNOTS[-1][0]
# Levels of a block of which a part is unknown.
PATH_LEVELS = 16

# (z_t of all blocks, t of each block) -> velocity of all
Velocity = Callable[[Latents, Float64[Tensor, "batch blocks"]], Latents]


def noise_levels(
    u: Float64[Tensor, "*shape"],
) -> tuple[Float64[Tensor, "*shape"], Float64[Tensor, "*shape"]]:
    """log gamma at each quantile u in [0, 1), and what its draw weighs: 1 / its density.

    The rest of the draws are of the decoder at `HIGHEST`: they weigh 1 / their share.
    """
    log_gamma = torch.full_like(u, HIGHEST)
    weight = torch.full_like(u, 1 / (1 - _KNOTS[-1][1]))
    for (low, below), (high, upto) in itertools.pairwise(_KNOTS):
        slope, inside = (high - low) / (upto - below), (u >= below) & (u < upto)
        log_gamma = torch.where(inside, low + (u - below) * slope, log_gamma)
        weight = torch.where(inside, slope, weight)
    return log_gamma, weight


def stratified(
    offsets: Float[Tensor, " draws"], numbers: Float[Tensor, " draws"], num_draws: int, blocks: int
) -> Float64[Tensor, "draws blocks"]:
    """Quantiles: each block's are one in each `num_draws`-th of [0, 1) over a row's draws.

    A draw's are spread over its blocks by the golden ratio, so that a row's sum varies little.

    Args:
        offsets: uniform in [0, 1), one a draw.
        numbers: of each draw in its row, from 0.
        num_draws, blocks: how many draws a row has, and how many blocks.
    """
    place = (numbers.double() + offsets.double()) / num_draws
    turns = torch.arange(blocks).to(place) * ((math.sqrt(5) - 1) / 2)
    return (place[:, None] + turns) % 1


def ends(posterior: Posterior) -> Float64[Tensor, "batch latents"]:
    """What is known of the bound in closed form, nats of each latent.

    KL of what is seen at `LOWEST` from what is seen of N(0, I) there; and, of q given what is seen
    at `HIGHEST` from the decoder, the part that is not of their means.
    """
    square, variance = posterior.mean.double().square(), posterior.logvar.double().exp()
    share = 1 / (1 + math.exp(-LOWEST))
    low = share * (square + variance - 1) - torch.log1p(share * (variance - 1))
    seen = math.exp(HIGHEST) * variance
    ratio = seen / (1 + seen)
    return 0.5 * (low + ratio - 1 - ratio.log()).sum(-1)


def excess(
    posterior: Posterior, z_t: Latents, velocity: Latents, log_gamma: Float64[Tensor, "#batch #lat"]
) -> Float64[Tensor, "batch latents"]:
    """gamma |E_q[z_0 | y] - x(y)|^2 / 2 of each latent.

    In nats per unit of log gamma; as a decoder's mean, in nats.
    """
    gamma, t = log_gamma.exp()[..., None], torch.sigmoid(-log_gamma / 2)[..., None]
    seen = gamma * posterior.logvar.double().exp()
    mean, y = posterior.mean.double(), z_t.double() / (1 - t)
    known = mean + seen / (1 + seen) * (y - mean)
    found = z_t.double() - t * velocity.double()
    return 0.5 * (gamma * (known - found).square()).sum(-1)


def latent_rates(
    velocity: Velocity,
    posterior: Posterior,
    z_0: Latents,
    noise: Latents,
    quantiles: Float64[Tensor, "batch blocks"],
) -> Float64[Tensor, "batch latents"]:
    """What each latent adds to its block's bound, nats; each block is seen at one noise level.

    The sum over a block is unbiased over `quantiles` and noise. Denoisers that get the same ones
    are compared in pairs.

    Args:
        velocity: of all blocks at once, each given what it is to know. Any denoiser's.
        posterior: q, of whole blocks.
        z_0: a sample of q.
        noise: of N(0, I).
        quantiles: of each block's level, uniform in [0, 1); see `stratified`.
    """
    size = z_0.shape[1] // quantiles.shape[1]
    log_gamma, weight = noise_levels(quantiles)
    t = torch.sigmoid(-log_gamma / 2)
    at_latents = t.repeat_interleave(size, dim=1)[..., None]
    z_t = interpolate(z_0.double(), noise.double(), at_latents).float()
    levels = log_gamma.repeat_interleave(size, dim=1)
    nats = excess(posterior, z_t, velocity(z_t, t), levels)
    return nats * weight.repeat_interleave(size, dim=1) + ends(posterior)


def packed_velocity(dit: BlockCausalDiT, z_0: Latents, document: Documents) -> Velocity:
    """The DiT's velocity of all blocks of rows given their clean history, in one pass."""
    size = dit.config.block_size

    def velocity(z_t: Latents, t: Float64[Tensor, "batch blocks"]) -> Latents:
        index = torch.arange(t.numel(), device=t.device).view_as(t).repeat_interleave(size, dim=1)
        times = Times(torch.cat([t.flatten(), t.new_zeros(1)]).float(), index)
        return dit.velocity(z_t, z_0, times, document)

    return velocity


def cached_velocity(
    dit: BlockCausalDiT, history: Float[Tensor, "batch before channels"]
) -> Velocity:
    """The DiT's velocity of one block of each row, in as many passes as are wanted.

    `history` are the clean latents of whole blocks before it, which may be none.
    """
    (batch, before), size = history.shape[:2], dit.config.block_size
    cache = dit.new_cache(batch, before + size)
    if before:
        filling = clean_attention(cache, before, size)
        clean = torch.zeros(1, 1, dtype=torch.long, device=history.device)
        dit(history, Times(history.new_zeros(1), clean), filling.slots, filling, outputs=0)
        cache.commit([before] * batch)
    attention = CachedAttention(cache, size)
    index = torch.arange(batch, device=history.device)[:, None].expand(batch, size)

    def velocity(z_t: Latents, t: Float64[Tensor, "batch blocks"]) -> Latents:
        found: Tensor = dit(z_t, Times(t[:, 0].float(), index), attention.slots, attention)
        return found

    return velocity


def partial_block_rate(
    velocity: Velocity,
    posterior: Posterior,
    z_0: Float[Tensor, "batch known channels"],
    noise: Float[Tensor, "batch levels block channels"],
    quantile: Float64[Tensor, " batch"],
) -> tuple[Float64[Tensor, " batch"], Float[Tensor, "batch unknown channels"]]:
    """The bound of the first latents of a block, nats, and values for the others.

    The others are unknown and take part as the DiT itself writes them: along a path of levels the
    known ones are seen ever better, and each step moves the unknown ones toward what the DiT then
    takes them for. Only errors of the known ones are counted. So their estimate at a level is a
    function of what is seen of *them* up to that level, and of noise: the theorem above holds for
    it, however few the levels, and what is bounded is a density of the known latents alone, that of
    a sampler that writes the others beside them. The unknown ones' own likelihood has no part in
    it, which is what made a short text less likely than a longer one.

    Args:
        velocity: of the block.
        posterior, z_0: q and a sample of it, of the known latents.
        noise: of N(0, I); every level takes an increment from it.
        quantile: uniform in [0, 1); all levels are shifted by it, so that each is unbiased.
    """
    num_levels, known = noise.shape[1], z_0.shape[1]
    places = torch.arange(num_levels, device=z_0.device) + (quantile * num_levels % 1)[:, None]
    log_gamma, weight = noise_levels(places / num_levels)
    gamma = torch.zeros_like(quantile)
    # gamma y of all latents: it grows by z_0 d gamma and independent noise.
    signal = torch.zeros_like(noise[:, 0], dtype=torch.float64)
    estimate = torch.zeros_like(signal)
    rate = ends(posterior).sum(1)
    for level in range(num_levels):
        step = (log_gamma[:, level].exp() - gamma)[:, None, None]
        gamma = log_gamma[:, level].exp()
        spread = step.sqrt() * noise[:, level].double()
        if level == 0:
            # Of the unknown ones, what is seen of N(0, I) at this level.
            spread[:, known:] *= (1 + step).sqrt()
        estimate[:, :known] = z_0.double()
        signal = signal + step * estimate + spread
        t = torch.sigmoid(-log_gamma[:, level, None] / 2)
        z_t = (((1 - t) / gamma[:, None])[..., None] * signal).float()
        v = velocity(z_t, t)
        estimate = z_t.double() - t[..., None] * v.double()
        nats = excess(posterior, z_t[:, :known], v[:, :known], log_gamma[:, level, None])
        rate = rate + nats.sum(1) * weight[:, level] / num_levels
    return rate, estimate[:, known:].float()

"""Cola DLM's log weights of rows: latents from the encoder, the prior by its bound or by its ODE.

The prior's density is found block by block (method, section 7; paper, 3.1.2).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.denoising_bound import (
    PATH_LEVELS,
    cached_velocity,
    latent_rates,
    packed_velocity,
    partial_block_rate,
    stratified,
)
from cola_train.likelihood.importance import LogWeights, log_weights
from cola_train.likelihood.ode import State, solve
from cola_train.likelihood.rows import Draw, ScoredRow, draws_at
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.models.text_vae import Documents, Latents, Posterior, TextVAE
from cola_train.models.vocabulary_head import row_nats
from cola_train.randomness import Purpose, normal, uniform

# of independent blocks of `width` coordinates each
Blocks = Float64[Tensor, "batch blocks width"]

# (z_t, t) -> dz/dt, of each block by that block alone
Velocity = Callable[[Blocks, Float64[Tensor, ""]], Blocks]


class LatentWeights:
    """log w of draws of z_0 ~ q(z_0 | x) for rows x of any length.

    A row that does not fill its last block of latents is filled up with end-of-text tokens. With
    x' the filled row, the encoder's q(z_0 | x') is positive everywhere, so that it may stand for a
    posterior *whatever* a row is filled with; the decoder's terms are those of the row's own
    tokens, since any others integrate to 1. Latents that hold none of these are left out of the
    bound (`partial_block_rate`, which also gives the decoder values in their place). The ODE needs
    whole blocks: its log p(z_0) includes the filling's latents, which are not likely after the
    row's own, and the estimate is the lower for them.
    """

    def __init__(
        self,
        vae: TextVAE,
        dit: BlockCausalDiT,
        tokenizer: Tokenizer,
        rows: Sequence[ScoredRow],
        config: LikelihoodConfig,
    ) -> None:
        """Fill `rows`, of which none is empty or has tokens that are given.

        Raises:
            UserError: method=bound, and a row that keeps documents apart does not fill its last
                block.
        """
        self.vae, self.dit, self.config = vae, dit, config
        self.pad_token_id, self.num_draws = tokenizer.pad_token_id, config.num_samples
        self.rows = rows
        block = self.vae.config.patch_size * self.dit.config.block_size
        eos = tokenizer.eos_token_id
        self.filled = [[*row.tokens, *[eos] * (-len(row.tokens) % block)] for row in rows]
        for number, row in enumerate(rows if config.method == "bound" else []):
            require(
                row.documents is None or len(row.tokens) % block == 0,
                f"Row {number} keeps documents apart and has {len(row.tokens)} tokens; for "
                f"likelihood.method=bound these must be a multiple of {block}, the tokens of a "
                "block. Cut it there, or give its documents as rows of their own.",
            )

    def width(self, row: int) -> int:
        """Tokens of a row: rows of one width have their latents in the same places."""
        return len(self.rows[row].tokens)

    def __call__(self, draws: Sequence[Draw]) -> LogWeights:
        """The weights of `draws`, all of one width."""
        vae = self.vae
        device = vae.decoder.in_layer.weight.device
        tokens = torch.tensor([self.filled[draw.row] for draw in draws], device=device)
        own = torch.arange(tokens.shape[1], device=device) < self.width(draws[0].row)
        scored = (tokens != self.pad_token_id) & own
        document = self._documents(draws, device)
        posterior = vae.encode(tokens, document)
        eps = self._drawn(draws, normal, Purpose.LIKELIHOOD_EPS, posterior.mean.shape[1:])

        def log_likelihood(z_0: Latents) -> Tensor:
            nats = row_nats(vae.decoder.head, vae.decoder(z_0, document), tokens)
            return -(nats * scored).sum(1)

        if self.config.method == "bound":
            z_0 = posterior.sample(eps)
            rate, z_0 = self._rate(draws, posterior, z_0, document)
            known = -(-self.width(draws[0].row) // vae.config.patch_size)
            entropy = -posterior.negative_entropy()[:, :known].double().sum(1)
            return LogWeights(log_likelihood(z_0), -rate - entropy, entropy)
        return self._by_ode(draws, posterior, eps, log_likelihood, document)

    def _drawn(
        self,
        draws: Sequence[Draw],
        kind: Callable[..., Tensor],
        purpose: Purpose,
        shape: Sequence[int],
    ) -> Tensor:
        """Values of shape (draws, *shape)."""
        device, count = self.vae.decoder.in_layer.weight.device, math.prod(shape)
        flat = draws_at(kind, self.config.seed, purpose, self.rows, draws, count, device)
        return flat.unflatten(1, tuple(shape))

    def _rate(
        self, draws: Sequence[Draw], posterior: Posterior, z_0: Latents, document: Documents
    ) -> tuple[Float64[Tensor, " draws"], Latents]:
        """Draws that bound KL(q || p) of a row's own latents, and z_0 with the others' replaced."""
        size, channels = self.dit.config.block_size, z_0.shape[2]
        known = -(-self.width(draws[0].row) // self.vae.config.patch_size)
        whole = known // size * size
        blocks = z_0.shape[1] // size
        offsets = self._drawn(draws, uniform, Purpose.LIKELIHOOD_LEVEL, (1,))[:, 0]
        numbers = torch.tensor([float(draw.number) for draw in draws], device=z_0.device)
        quantiles = stratified(offsets, numbers, self.num_draws, blocks)
        rate = quantiles.new_zeros(len(draws))
        if whole:
            noise = self._drawn(draws, normal, Purpose.LIKELIHOOD_NOISE, (whole, channels))
            before = z_0[:, :whole]
            inside = None if document is None else document[:, :whole]
            velocity = packed_velocity(self.dit, before, inside)
            of_blocks = quantiles[:, : whole // size]
            rates = latent_rates(velocity, _cut(posterior, 0, whole), before, noise, of_blocks)
            rate = rate + rates.sum(1)
        if whole == known:
            return rate, z_0
        shape = (PATH_LEVELS, size, channels)
        noise = self._drawn(draws, normal, Purpose.LIKELIHOOD_PATH, shape)
        partial, written = partial_block_rate(
            cached_velocity(self.dit, z_0[:, :whole]),
            _cut(posterior, whole, known),
            z_0[:, whole:known],
            noise,
            quantiles[:, -1],
        )
        return rate + partial, torch.cat([z_0[:, :known], written], dim=1)

    def _by_ode(
        self,
        draws: Sequence[Draw],
        posterior: Posterior,
        eps: Latents,
        log_likelihood: Callable[[Latents], Tensor],
        document: Documents,
    ) -> LogWeights:
        config, probe = self.config, None
        if config.divergence == "hutchinson":
            # Of all probes of independent coordinates, signs have the least variance: what the
            # diagonal adds is exact.
            draw = self._drawn(draws, uniform, Purpose.LIKELIHOOD_PROBE, eps.shape[1:])
            probe = torch.where(draw < 0.5, -1.0, 1.0)

        def log_prior(z_0: Latents, steps: int = config.num_steps) -> Tensor:
            solver = dataclasses.replace(config, num_steps=steps)
            return block_log_densities(self.dit, z_0, solver, document, probe).sum(1)

        found = log_weights(posterior, eps, log_likelihood, log_prior)
        if config.solver == "dopri5":
            return found
        finer = log_prior(posterior.sample(eps), 2 * config.num_steps)
        return dataclasses.replace(found, step_change=finer - found.prior)

    def _documents(
        self, draws: Sequence[Draw], device: torch.device
    ) -> Int[Tensor, "draws latents"] | None:
        """The document of each latent; a filling belongs to the last one."""
        documents = [self.rows[draw.row].documents for draw in draws]
        if all(numbers is None for numbers in documents):
            return None
        width, patch_size = len(self.filled[draws[0].row]), self.vae.config.patch_size
        own = [numbers or [0] for numbers in documents]
        filled = [[*row, *[row[-1]] * width][:width:patch_size] for row in own]
        return torch.tensor(filled, device=device)


def _cut(posterior: Posterior, start: int, end: int) -> Posterior:
    return Posterior(posterior.mean[:, start:end], posterior.logvar[:, start:end])


def log_density(
    velocity: Velocity, z_0: Blocks, config: LikelihoodConfig, probe: Blocks | None = None
) -> Float64[Tensor, "batch blocks"]:
    """log p(z_0) of each block, nats, under the flow that carries data (t = 0) to N(0, I) (t = 1).

    d/dt [z, l] = [v(z, t), div v(z, t)] from (z_0, 0); log p(z_0) = log N(z_1; 0, I) + l(1). All
    but the velocity is computed in float64.

    `probe` are draws of mean 0 and covariance I, held fixed for the whole solve: the divergence is
    then Hutchinson's estimate, and the result is unbiased over probes up to the solver's error.
    Without them the divergence is exact.

    Raises:
        UserError: as `solve`.
    """

    def derivative(t: Float64[Tensor, ""], state: State) -> State:
        return velocity_and_divergence(velocity, state[0], t, probe)

    z_1, gained = solve(derivative, (z_0, torch.zeros_like(z_0[..., 0])), config)
    return -0.5 * (z_1.square() + math.log(2 * math.pi)).sum(-1) + gained


def velocity_and_divergence(
    velocity: Velocity, z: Blocks, t: Float64[Tensor, ""], probe: Blocks | None
) -> tuple[Blocks, Float64[Tensor, "batch blocks"]]:
    """v(z, t), and each block's divergence: exact, or e^T J e for `probe` e.

    J, the Jacobian of all blocks, is block diagonal. So one backward pass gives e^T J e of every
    block, and `width` of them, each for one coordinate of every block, the diagonals.
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = velocity(z, t)
        if probe is not None:
            (row,) = torch.autograd.grad((v * probe).sum(), z)
            return v.detach(), (row * probe).sum(-1)
        divergence = torch.zeros_like(v[..., 0])
        for place in range(z.shape[-1]):
            (row,) = torch.autograd.grad(
                v[..., place].sum(), z, retain_graph=place + 1 < z.shape[-1]
            )
            divergence = divergence + row[..., place]
    return v.detach(), divergence.detach()


def block_log_densities(
    dit: BlockCausalDiT,
    z_0: Float[Tensor, "batch latents channels"],
    config: LikelihoodConfig,
    document: Int[Tensor, "batch latents"] | None = None,
    probe: Float[Tensor, "batch latents channels"] | None = None,
) -> Float64[Tensor, "batch blocks"]:
    """log p(z_0^(b) | z_0^(<b)) of every block, nats; their sum over a row is log p_psi(z_0).

    All blocks of a row are transported at once: the packed pass of training gives each noised
    block's velocity given its clean history. The guidance of sampling has no part in it. The DiT's
    parameters have no gradient; `probe` is as of `log_density`.
    """
    size = dit.config.block_size
    index = torch.zeros(z_0.shape[:2], dtype=torch.long, device=z_0.device)

    def as_blocks(latents: Tensor) -> Tensor:
        return latents.unflatten(1, (-1, size)).flatten(2).double()

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        z_t = z.float().unflatten(2, (size, -1)).flatten(1, 2)
        times = Times(torch.stack([t, torch.zeros_like(t)]).float(), index)
        return as_blocks(dit.velocity(z_t, z_0, times, document))

    return log_density(
        velocity, as_blocks(z_0), config, None if probe is None else as_blocks(probe)
    )

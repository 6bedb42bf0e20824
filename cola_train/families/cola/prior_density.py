"""log p_psi(z0), the prior's density, block by block by the augmented ODE.

Method, section 7; paper, 3.1.2.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.likelihood.ode import State, solve
from cola_train.models.dit import BlockCausalDiT, Times

# of independent blocks of `width` coordinates each
Blocks = Float64[Tensor, "batch blocks width"]

# (z_t, t) -> dz/dt, of each block by that block alone
Velocity = Callable[[Blocks, Float64[Tensor, ""]], Blocks]


def log_density(
    velocity: Velocity, z_0: Blocks, config: LikelihoodConfig, probe: Blocks | None = None
) -> Float64[Tensor, "batch blocks"]:
    """log p(z_0) of each block, nats, under the flow that carries data (t = 0) to N(0, I) (t = 1).

    d/dt [z, l] = [v(z, t), div v(z, t)] from (z_0, 0); log p(z_0) = log N(z_1; 0, I) + l(1). All
    but the velocity is computed in float64.

    Args:
        velocity: of all blocks at once.
        z_0: latents of each block.
        config: the solver.
        probe: draws of mean 0 and covariance I, held fixed for the whole solve: the divergence is
            then Hutchinson's estimate, and the result is unbiased over probes up to the solver's
            error. None: the divergence is exact.

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
    block's velocity given its clean history. The guidance of sampling has no part in it.

    Args:
        dit: its parameters without gradient.
        z_0: whole blocks of clean latents.
        config: the solver.
        document: of each latent, where documents are apart.
        probe: as of `log_density`.
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

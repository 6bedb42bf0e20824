"""Ordinary differential equations of many independent blocks, t = 0 to 1, by torchdiffeq."""

from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import UserError

State = tuple[Float64[Tensor, "batch blocks ..."], ...]
Derivative = Callable[[Float64[Tensor, ""], State], State]

# The sampler's "heun" is another method: its last step is Euler's, so that it needs no slope at
# t = 0, where this ODE begins.
_SOLVERS = {"euler": "euler", "trapezoid": "heun2", "dopri5": "dopri5"}
_MOST_STEPS = 1000


@torch.no_grad()
def solve(derivative: Derivative, start: State, config: LikelihoodConfig) -> State:
    """The state at t = 1 of d state / dt = derivative(t, state), from `start` at t = 0.

    The state is latents and the integral of their divergence, tensors that both begin with (batch,
    blocks), and a block's derivative must depend on that block alone. euler and trapezoid (the
    explicit trapezoidal rule, torchdiffeq's heun2) take config.num_steps equal steps, so a block's
    result does not depend on its batch. dopri5 chooses steps for the whole batch, such that the
    estimated error of a step, root mean square over each tensor of a block in units of its
    tolerance, is at most 1 in *every* block: each keeps the tolerance as if it were alone, and its
    result depends on its batch only within that. The tolerance is atol + rtol |z| for latents and
    atol for the integral, in nats: one relative to the integral would allow an error of all of it.

    Raises:
        UserError: dopri5 cannot keep its tolerance.
    """
    # It imports scipy, and every training can ask for likelihoods but few do.
    from torchdiffeq import odeint

    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=start[0].device)
    if config.solver == "dopri5":
        # Steps end at t = 1: beyond, the velocity was never trained.
        options = {"norm": _worst_block, "step_t": ends[1:], "max_num_steps": _MOST_STEPS}
    else:
        grid = torch.linspace(0, 1, config.num_steps + 1, dtype=ends.dtype, device=ends.device)
        options = {"grid_constructor": lambda *_: grid}
    try:
        relative = torch.zeros(len(start), dtype=ends.dtype, device=ends.device)
        relative[0] = config.rtol
        tolerances = {"rtol": tuple(relative), "atol": config.atol}
        method = _SOLVERS[config.solver]
        path = odeint(derivative, start, ends, **tolerances, method=method, options=options)
    # torchdiffeq's: not finite, a step of no length, too many steps
    except AssertionError as error:
        raise UserError(
            f"dopri5 cannot solve the prior's ODE to rtol={config.rtol}, atol={config.atol} "
            f"({str(error)[:60]}): the velocity is not finite or not smooth. Use larger "
            "tolerances or solver=trapezoid; look at the checkpoint with `cola-train inspect`."
        ) from error
    return tuple(values[-1] for values in path)


def _worst_block(state: State) -> Float64[Tensor, ""]:
    worst = []
    for values in state:
        errors = values.flatten(2).square().mean(2).sqrt() if values.ndim > 2 else values.abs()
        worst.append(errors.max())
    return torch.stack(worst).max()

"""The sampler's solvers as plans: the times of network calls, and the weights of velocities.

The sampler follows these plans (flow.py's `integrate`), and FLOPs count their calls, so the two
cannot disagree. There are no tensors here: what a run would cost is known without torch.
"""

from typing import NamedTuple

from cola_train.config.sampling import Solver

# Adams-Bashforth: weights of the velocities at this step and those before, by how many there are.
_ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12))
# of Adams-Bashforth; Euler's method is its order 1
_ORDER = {"euler": 1, "heun": 1, "adams2": 2, "adams3": 3}


class SolverStep(NamedTuple):
    """A step from time t to t_next < t along a slope.

    Attributes:
        weights: the slope is the sum of weights times velocities, of the one at t and of those at
            the steps before, newest first.
        is_heun: the slope is the mean of the velocities at t and, after an Euler step, at t_next;
            `weights` is (1,).
    """

    t: float
    t_next: float
    weights: tuple[float, ...]
    is_heun: bool


def time_grid(num_steps: int) -> list[float]:
    """The sampler's times: num_steps + 1 of them, evenly from 1 to 0."""
    return [1 - step / num_steps for step in range(num_steps + 1)]


def solver_steps(solver: Solver, num_steps: int) -> list[SolverStep]:
    """What a solver does, step by step.

    euler: order 1. heun: order 2, the mean of the velocities at both ends of a step; its last step
    is Euler's, as in Karras et al. 2022 (algorithm 1): training never asks for velocities at t = 0.
    adams2, adams3: Adams-Bashforth, whose first steps know fewer velocities: adams2 begins with a
    step of Euler, adams3 with one of Heun, which keeps its order of 3.
    """
    times, steps = time_grid(num_steps), []
    for step in range(num_steps):
        weights = _ADAMS_BASHFORTH[min(step + 1, _ORDER[solver]) - 1]
        is_heun = (solver == "heun" or (solver == "adams3" and step == 0)) and step + 1 < num_steps
        steps.append(SolverStep(times[step], times[step + 1], weights, is_heun))
    return steps


def network_calls(solver: Solver, num_steps: int) -> list[int]:
    """The places in `time_grid(num_steps)` at which a solver calls the network, in order.

    All are times of the grid, so that what depends on time alone is computed once; none is t = 0,
    which no noised latent of training ever has.
    """
    steps = solver_steps(solver, num_steps)
    return [
        place
        for step, plan in enumerate(steps)
        for place in ((step, step + 1) if plan.is_heun else (step,))
    ]

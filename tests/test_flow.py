"""The straight path against derivatives, quadrature and least squares on draws."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.sampling import Solver
from cola_train.flow import (
    euler_step,
    gaussian_baseline,
    guide,
    integrate,
    interpolate,
    logit_normal_time,
    mean_velocity,
    rescale_guided,
    velocity_target,
)
from cola_train.solvers import network_calls, time_grid
from tests.helpers.compare import assert_near
from tests.helpers.tiny import random_latents

Z_0, Z_1 = random_latents(2, 3, 4, seed=80), random_latents(2, 3, 4, seed=81)


def test_the_path_runs_from_data_to_noise() -> None:
    assert torch.equal(interpolate(Z_0, Z_1, torch.zeros(1, 1, 1)), Z_0)
    assert torch.equal(interpolate(Z_0, Z_1, torch.ones(1, 1, 1)), Z_1)
    per_position = torch.rand(2, 3, 1, generator=torch.Generator().manual_seed(1))
    z_t = interpolate(Z_0, Z_1, per_position)
    for row in range(2):
        for position in range(3):
            t = float(per_position[row, position])
            assert_near(
                z_t[row, position], (1 - t) * Z_0[row, position] + t * Z_1[row, position], 1e-6
            )


def test_the_target_is_the_derivative_of_the_path() -> None:
    t = torch.full(Z_0.shape, 0.3, requires_grad=True)
    (derivative,) = torch.autograd.grad(interpolate(Z_0, Z_1, t).sum(), t)
    assert_near(velocity_target(Z_0, Z_1), derivative, 1e-6)


@given(st.integers(1, 64))
def test_the_time_grid_is_even_from_noise_to_data(num_steps: int) -> None:
    times = time_grid(num_steps)
    assert (times[0], times[-1], len(times)) == (1.0, 0.0, num_steps + 1)
    assert_near(
        torch.tensor(times, dtype=torch.float64),
        torch.linspace(1, 0, num_steps + 1, dtype=torch.float64),
        1e-12,
    )


@given(st.integers(1, 20))
def test_euler_follows_a_straight_path_to_its_end(num_steps: int) -> None:
    z, times = Z_1, time_grid(num_steps)
    for t, t_next in itertools.pairwise(times):
        z = euler_step(z, velocity_target(Z_0, Z_1), t, t_next)
        assert_near(z, interpolate(Z_0, Z_1, torch.full((1, 1, 1), t_next)))
    assert_near(z, Z_0)


SOLVERS: list[Solver] = ["euler", "heun", "adams2", "adams3"]
MEAN, DEVIATION = 1.5, 0.3


def gaussian_velocity(z: torch.Tensor, t: float) -> torch.Tensor:
    """E[z_1 - z_0 | z_t = z] for z_0 ~ N(MEAN, DEVIATION^2): the exact field whose flow is known in
    closed form.
    """
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    away = (z - (1 - t) * MEAN) / variance
    return t * away - (MEAN + (1 - t) * DEVIATION**2 * away)


def solver_error(solver: Solver, num_steps: int) -> float:
    """Of the greatest error at t = 0, where the flow takes z_1 to MEAN + DEVIATION z_1."""
    z_1, times = torch.linspace(-2, 2, 9, dtype=torch.float64), time_grid(num_steps)
    z_0 = integrate(lambda z, step: gaussian_velocity(z, times[step]), z_1, num_steps, solver)
    return float((z_0 - (MEAN + DEVIATION * z_1)).abs().max())


@pytest.mark.parametrize(
    ("solver", "order"), [("euler", 1), ("heun", 2), ("adams2", 2), ("adams3", 3)]
)
def test_solvers_converge_with_their_order(solver: Solver, order: int) -> None:
    errors = [solver_error(solver, num_steps) for num_steps in (128, 256, 512)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.15)


def test_higher_orders_are_nearer_in_few_steps() -> None:
    assert solver_error("adams3", 32) < solver_error("heun", 32) < solver_error("euler", 32) / 5
    assert solver_error("adams2", 32) < solver_error("euler", 32) / 2


@given(st.sampled_from(SOLVERS), st.integers(1, 20))
def test_every_solver_follows_a_straight_path_and_calls_where_it_says(
    solver: Solver, num_steps: int
) -> None:
    called: list[int] = []

    def constant(z: torch.Tensor, step: int) -> torch.Tensor:
        called.append(step)
        assert_near(z, interpolate(Z_0, Z_1, torch.full((1, 1, 1), time_grid(num_steps)[step])))
        return velocity_target(Z_0, Z_1)

    assert_near(integrate(constant, Z_1, num_steps, solver), Z_0)
    assert called == network_calls(solver, num_steps)
    assert num_steps not in called  # t = 0


def test_the_network_calls_are_known_without_torch() -> None:
    code = (
        "import sys\n"
        "from cola_train.solvers import network_calls, time_grid\n"
        "assert len(network_calls('heun', 16)) == 31 and time_grid(4)[1] == 0.75\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_network_calls_of_each_solver() -> None:
    assert [len(network_calls(solver, 10)) for solver in SOLVERS] == [10, 19, 10, 11]
    assert [network_calls(solver, 1) for solver in SOLVERS] == [[0]] * 4


def test_one_step_of_each_kind_by_hand() -> None:
    """dz/dt = z^2 + t from z = 1 in two steps of 1/2, worked out on paper."""

    def slope(z: torch.Tensor, step: int) -> torch.Tensor:
        return z**2 + time_grid(2)[step]

    start = torch.ones(1, dtype=torch.float64)
    # The slope is 2 at first. Euler: z = 1 - 2/2 = 0, slope 1/2. Heun: z = 1 - (2 + 1/2)/4 = 3/8,
    # slope 9/64 + 1/2 = 41/64.
    expected = {
        "euler": 0 - 1 / 4,
        "heun": 3 / 8 - 41 / 128,
        "adams2": 0 - (3 / 2 * 1 / 2 - 1 / 2 * 2) / 2,
        "adams3": 3 / 8 - (3 / 2 * 41 / 64 - 1 / 2 * 2) / 2,
    }
    for solver in SOLVERS:
        assert float(integrate(slope, start, 2, solver)) == pytest.approx(
            expected[solver], abs=1e-12
        )


def test_rescaling_gives_the_conditional_deviation_over_counted_positions() -> None:
    guided, conditional = random_latents(2, 5, 4, seed=86) * 3 + 1, random_latents(2, 5, 4, seed=87)
    counted = torch.tensor([[True] * 5, [False, False, True, True, True]])
    whole = rescale_guided(guided, conditional, counted, 1.0)
    half = rescale_guided(guided, conditional, counted, 0.5)
    assert torch.equal(rescale_guided(guided, conditional, counted, 0.0), guided)
    for row in range(2):
        wanted = conditional[row, counted[row]].std(correction=0)
        assert_near(whole[row, counted[row]].std(correction=0), wanted, 1e-6)
        # A scaling, of the mean too; and half of the way.
        assert_near(
            whole[row] / guided[row],
            (wanted / guided[row, counted[row]].std(correction=0)).expand(5, 4),
        )
        assert_near(half[row], (guided[row] + whole[row]) / 2)


def test_guidance_extrapolates_by_row() -> None:
    scale = torch.tensor([0.0, 1.0, 7.0])[:, None, None]
    conditional, unconditional = random_latents(3, 2, 4, seed=82), random_latents(3, 2, 4, seed=83)
    guided = guide(conditional, unconditional, scale)
    assert_near(guided[0], unconditional[0], 1e-6)
    assert_near(guided[1], conditional[1], 1e-6)
    assert_near(guided[2], 7 * conditional[2] - 6 * unconditional[2])


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (0.0, 1.0), (-2.0, 0.5)])
def test_logit_normal_times_have_the_logit_of_a_normal(loc: float, scale: float) -> None:
    normal = random_latents(1000, seed=84)
    t = logit_normal_time(normal, loc, scale)
    assert ((t > 0) & (t < 1)).all()
    assert_near(torch.logit(t.double()), loc + scale * normal.double(), 1e-4)


def least_squares_residual(z_0: torch.Tensor, z_1: torch.Tensor, t: float) -> float:
    """What the best linear prediction of z_1 - z_0 from z_t leaves, found from the draws
    themselves.
    """
    z_t, u = (1 - t) * z_0 + t * z_1, z_1 - z_0
    features = torch.stack([z_t, torch.ones_like(z_t)], dim=1)
    solution = torch.linalg.lstsq(features, u[:, None]).solution
    return float((features @ solution - u[:, None]).square().mean())


def test_the_mean_variance_bound_is_what_least_squares_leaves() -> None:
    draws = 200_000
    generator = torch.Generator().manual_seed(85)
    variance, t = torch.tensor([0.1, 1.0, 4.0]), torch.tensor([0.05, 0.5, 0.9])
    # Whatever z_0's distribution, two moments decide; a skewed one with a mean shows it.
    skewed = torch.rand(draws, generator=generator, dtype=torch.float64).log().neg() + 2
    z_1 = torch.randn(draws, generator=generator, dtype=torch.float64)
    residuals = [
        [least_squares_residual(s2.sqrt() * skewed, z_1, float(time)) for s2 in variance]
        for time in t
    ]
    for time, row in zip(t, residuals, strict=True):
        for s2, residual in zip(variance, row, strict=True):
            assert abs(residual / gaussian_baseline(s2[None], time[None]) - 1) < 0.02
    assert abs(gaussian_baseline(variance, t) / float(torch.tensor(residuals).mean()) - 1) < 0.02


@given(st.floats(0, 1), st.floats(1e-3, 10))
def test_the_bound_at_the_ends_of_the_path(t: float, variance: float) -> None:
    bound = gaussian_baseline(torch.tensor([variance]), torch.tensor([t]))
    # Knowing z_t never leaves more than not knowing it: Var(z_1 - z_0) = 1 + s^2.
    assert 0 < bound <= (1 + variance) * (1 + 1e-6)
    # z_t is z_0 at t = 0, and z_1 at t = 1: the other's variance is left.
    assert gaussian_baseline(torch.tensor([variance]), torch.zeros(1)) == pytest.approx(1.0)
    assert gaussian_baseline(torch.tensor([variance]), torch.ones(1)) == pytest.approx(variance)


@pytest.mark.parametrize("t", [0.0, 0.05, 0.3, 0.8, 1.0])
def test_the_mean_velocity_is_the_regression_of_draws_on_the_path(t: float) -> None:
    generator = torch.Generator().manual_seed(9)
    mean, variance = torch.tensor(0.7), torch.tensor(0.09)
    noise, z_1 = torch.randn(2, 400_000, generator=generator)
    z_0 = mean + variance.sqrt() * noise
    time = torch.full((1,), t)
    z_t, u = interpolate(z_0, z_1, time), z_1 - z_0
    found, spread = mean_velocity(z_t, time, mean, variance)
    # All is Gaussian, so that the conditional mean is a line.
    slope = ((z_t - z_t.mean()) * (u - u.mean())).mean() / z_t.var()
    line = u.mean() + slope * (z_t - z_t.mean())
    assert_near(found, line, 0.02)
    assert_near((u - found).square().mean(), spread.mean(), 0.01)

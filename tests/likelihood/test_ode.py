"""The solvers against solutions in closed form: their order, their tolerance, and that a block has
no part in another's result.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.load import load_config
from cola_train.config.settings import UserError
from cola_train.flow import integrate
from cola_train.likelihood.ode import State, solve

# (batch, blocks, 2)
RATES = torch.tensor([[[0.5, 2.0], [3.0, 1.0]], [[-0.4, 1.0], [0.1, 6.0]]], dtype=torch.float64)


def decay(rates: Tensor):  # type: ignore[no-untyped-def]
    """y' = -r y^2 from y = 1 is 1 / (1 + r t); and, as the second tensor, the integral of the mean
    of y.
    """

    def derivative(t: Tensor, state: State) -> State:
        return -rates * state[0].square(), state[0].mean(-1)

    return derivative


def solved(rates: Tensor, **settings: float | str) -> State:
    start = torch.ones_like(rates)
    return solve(
        decay(rates), (start, torch.zeros_like(start[..., 0])), LikelihoodConfig(**settings)
    )  # type: ignore[arg-type]


def truth(rates: Tensor) -> State:
    return 1 / (1 + rates), (torch.log1p(rates) / rates).mean(-1)


def worst(found: State, expected: State) -> float:
    return max(float((one - other).abs().max()) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("trapezoid", 2)])
def test_the_error_falls_with_the_order(solver: str, order: int) -> None:
    errors = [
        worst(solved(RATES, solver=solver, num_steps=steps), truth(RATES))
        for steps in (64, 128, 256)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.06)


def test_the_steps_are_those_of_euler_and_of_the_trapezoidal_rule() -> None:
    y = torch.ones(1, 1, 1, dtype=torch.float64)
    rates = torch.full_like(y, 1.0)
    euler = y.clone()
    for _ in range(3):
        euler = euler - euler.square() / 3
    assert float(solved(rates, solver="euler", num_steps=3)[0]) == pytest.approx(
        float(euler), abs=1e-15
    )
    ahead = y - y.square()
    assert float(solved(rates, solver="trapezoid", num_steps=1)[0]) == pytest.approx(
        float(y - (y**2 + ahead**2) / 2), abs=1e-15
    )


def test_the_trapezoidal_rule_is_not_the_samplers_heun() -> None:
    """They agree in all steps but the sampler's last, which is Euler's (Karras et al. 2022)."""
    rates = torch.full((1, 1, 1), 1.0, dtype=torch.float64)
    two = solved(rates, solver="trapezoid", num_steps=2)[0]

    def velocity(y: Tensor, place: int) -> Tensor:
        return rates * y.square()

    heun = integrate(velocity, torch.ones_like(rates), 2, "heun")
    # y' = -y^2 / 2 over [0, 1]: half of the way
    half = solved(rates / 2, solver="trapezoid", num_steps=1)[0]
    assert float(heun) == pytest.approx(float(half - half.square() / 2), abs=1e-15)
    assert float(heun) != pytest.approx(float(two), abs=1e-3)
    with pytest.raises(UserError, match="must be one of euler, trapezoid, dopri5, not heun"):
        load_config(LikelihoodConfig, None, ["solver=heun"])


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5, 1e-8])
def test_dopri5_keeps_its_tolerance(tolerance: float) -> None:
    found = solved(RATES, solver="dopri5", rtol=tolerance, atol=tolerance)
    assert worst(found, truth(RATES)) < 5 * tolerance


def test_dopri5_keeps_it_in_a_block_among_a_thousand_easy_ones() -> None:
    # A root mean square over the batch would let the one hard block be 30 times worse.
    rates = torch.full((1000, 1, 2), 1e-3, dtype=torch.float64)
    rates[537] = 40.0
    found = solved(rates, solver="dopri5", rtol=1e-4, atol=1e-4)
    alone = solved(rates[537:538], solver="dopri5", rtol=1e-4, atol=1e-4)
    assert worst(found, truth(rates)) < 5e-4
    assert worst((found[0][537:538], found[1][537:538]), alone) < 5e-4


@pytest.mark.parametrize("solver", ["euler", "trapezoid"])
def test_with_fixed_steps_a_block_gets_what_it_gets_alone(solver: str) -> None:
    together = solved(RATES, solver=solver)
    for row in range(2):
        for block in range(2):
            alone = solved(RATES[row : row + 1, block : block + 1], solver=solver)
            assert all(
                torch.equal(one[row, block], other[0, 0])
                for one, other in zip(together, alone, strict=True)
            )


@pytest.mark.parametrize("solver", ["euler", "trapezoid", "dopri5"])
def test_only_times_from_0_to_1_are_asked_for(solver: str) -> None:
    times = []

    def derivative(t: Tensor, state: State) -> State:
        times.append(float(t))
        return (state[0] * 0.1,)

    (end,) = solve(
        derivative, (torch.ones(1, 1, 1, dtype=torch.float64),), LikelihoodConfig(solver=solver)
    )  # type: ignore[arg-type]
    assert min(times) == 0.0
    assert max(times) <= 1.0
    assert float(end) == pytest.approx(1.1051709, abs=0.006)


def test_dopri5_says_what_to_do_where_it_cannot_go_on() -> None:
    def derivative(t: Tensor, state: State) -> State:
        return (torch.where(t > 0.5, torch.nan, 1.0) * state[0],)

    with pytest.raises(
        UserError,
        match=r"dopri5 cannot solve the prior's ODE to rtol=0.001, atol=0.001 .* solver=trapezoid",
    ):
        solve(
            derivative,
            (torch.ones(1, 1, 1, dtype=torch.float64),),
            LikelihoodConfig(solver="dopri5"),
        )


def test_dopri5_keeps_its_tolerance_for_the_integral_however_large_it_is() -> None:
    """Relative to an integral of 400 nats, rtol=1e-3 would allow an error of 0.4."""

    def derivative(t: Tensor, state: State) -> State:
        return torch.zeros_like(state[0]), (400 + 20 * torch.cos(40 * t)).expand(1, 1)

    start = (torch.ones(1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64))
    config = LikelihoodConfig(solver="dopri5", rtol=1e-1, atol=1e-4)
    expected = 400 + 20 * math.sin(40) / 40
    assert float(solve(derivative, start, config)[1]) == pytest.approx(expected, abs=1e-2)

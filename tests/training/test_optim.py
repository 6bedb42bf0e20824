"""The learning rate as a pure function of the step, its horizons in steps, tokens or EFLOPs."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.loop import OptimConfig
from cola_train.config.runs import JointRunConfig
from cola_train.config.settings import UserError
from cola_train.flops.steps import flops_after
from cola_train.training.optim import Schedule

PAPER = Schedule(OptimConfig(), 5000, 1_000_000, 0)
STABLE = Schedule(OptimConfig(schedule="wsd", anneal="200"), 100, 1000, 200)


def test_the_papers_schedule_at_its_corners() -> None:
    assert PAPER.rate(0) == pytest.approx(1e-6)
    assert PAPER.rate(2500) == pytest.approx((1e-6 + 1.5e-4) / 2)
    assert PAPER.rate(5000) == pytest.approx(1.5e-4)
    assert PAPER.rate(502_500) == pytest.approx((1.5e-4 + 1e-5) / 2)
    assert PAPER.rate(1_000_000) == pytest.approx(1e-5)
    assert PAPER.rate(5_000_000) == pytest.approx(1e-5)


@given(st.integers(0, 1_000_000))
def test_it_rises_then_falls_without_a_jump(step: int) -> None:
    here, after = PAPER.rate(step), PAPER.rate(step + 1)
    assert (after > here) if step < 5000 else (after <= here)
    steepest = max(1.5e-4 / 5000, math.pi * 1.5e-4 / 2 / 995_000)
    assert abs(after - here) <= steepest * 1.001


def test_warmup_stable_decay_is_constant_between_and_straight_at_the_end() -> None:
    assert STABLE.rate(50) == pytest.approx((1e-6 + 1.5e-4) / 2)
    assert {STABLE.rate(step) for step in range(100, 801)} == {1.5e-4}
    assert STABLE.rate(900) == pytest.approx((1.5e-4 + 1e-5) / 2)
    assert STABLE.rate(1000) == STABLE.rate(2000) == pytest.approx(1e-5)


def test_horizons_in_tokens_and_eflops_become_the_steps_that_reach_them(joint_config: Callable[..., JointRunConfig]) -> None:
    cost = flops_after(joint_config("x"), 30)["model"] / FLOPS_PER_EFLOP
    config = joint_config("x", f"optim.warmup='{7 * 4 * 32} tokens'", f"optim.decay='{cost!r} EFLOPs'")
    assert Schedule.of(config) == Schedule(config.optim, 7, 30, 0)
    # A token more needs another step.
    assert Schedule.of(joint_config("x", f"optim.warmup='{7 * 4 * 32 + 1} tokens'", "optim.decay=9")).warmup_steps == 8


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim.warmup=30", "optim.decay=30"], r"optim.warmup \('30', 30 steps\) must end before optim.decay \('30', 30 steps\)"),
        (["optim.schedule=wsd", "optim.anneal=29", "optim.decay=30"], r"before the anneal \('29', 29 steps\) begins"),
        (["optim.anneal=3"], "optim.anneal is the last part of optim.schedule=wsd"),
        (["optim.schedule=wsd"], "needs it, as it needs an anneal above 0"),
        (["optim.decay='1 EFLOPs'", "budget.convention=executed"], "cannot be EFLOPs with budget.convention=executed"),
        (["optim.decay=later"], "optim.decay must be an amount"),
    ],
)
def test_horizons_that_do_not_fit_are_refused(
    joint_config: Callable[..., JointRunConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Schedule.of(joint_config("x", *overrides))

"""The learning rate as a pure function of the step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.loop import OptimConfig
from cola_train.training.optim import learning_rate

PAPER = OptimConfig()


def test_the_papers_schedule_at_its_corners() -> None:
    assert learning_rate(PAPER, 0) == pytest.approx(1e-6)
    assert learning_rate(PAPER, 2500) == pytest.approx((1e-6 + 1.5e-4) / 2)
    assert learning_rate(PAPER, 5000) == pytest.approx(1.5e-4)
    assert learning_rate(PAPER, 502_500) == pytest.approx((1.5e-4 + 1e-5) / 2)
    assert learning_rate(PAPER, 1_000_000) == pytest.approx(1e-5)
    assert learning_rate(PAPER, 5_000_000) == pytest.approx(1e-5)


@given(st.integers(0, 1_000_000))
def test_it_rises_then_falls_without_a_jump(step: int) -> None:
    here, after = learning_rate(PAPER, step), learning_rate(PAPER, step + 1)
    assert (after > here) if step < PAPER.warmup_steps else (after <= here)
    steepest = max(PAPER.learning_rate / PAPER.warmup_steps, math.pi * PAPER.learning_rate / 2 / 995_000)
    assert abs(after - here) <= steepest * 1.001

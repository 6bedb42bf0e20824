"""From steps to FLOPs and back, against adding up step by step."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.config.amounts import Amount
from cola_train.families.costs import CONVENTIONS, flops_after, step_flops, steps_to
from cola_train.families.registry import load_run_config
from tests.flops.counting import changed, run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def interval(joint: int, frozen: int, convention: str = "model") -> Any:
    strategy = {"mode": "interval", "joint_steps": joint, "frozen_steps": frozen}
    values = {f"objective.vae_strategy.{name}": value for name, value in strategy.items()}
    return changed(run_config("joint"), {**values, "budget.convention": convention})


@settings(max_examples=15)
@given(joint=st.integers(1, 4), frozen=st.integers(1, 4), steps=st.integers(0, 20))
def test_flops_after_adds_up_every_step(joint: int, frozen: int, steps: int) -> None:
    config = interval(joint, frozen)
    each = [step_flops(config, step) for step in range(steps)]
    assert flops_after(config, steps) == {
        convention: sum(flops[convention] for flops in each) for convention in CONVENTIONS
    }


@settings(max_examples=15)
@given(
    joint=st.integers(1, 4),
    frozen=st.integers(1, 4),
    steps=st.integers(0, 20),
    share=st.floats(0, 1),
    convention=st.sampled_from(list(CONVENTIONS)),
)
def test_steps_to_is_the_first_that_reaches(
    joint: int, frozen: int, steps: int, share: float, convention: str
) -> None:
    config = interval(joint, frozen, convention)
    here, there = (
        flops_after(config, number)[config.budget.convention] for number in (steps, steps + 1)
    )
    amount = here + int(share * (there - here))
    reached = (
        n for n in itertools.count() if flops_after(config, n)[config.budget.convention] >= amount
    )
    assert steps_to(config, Amount(amount, "EFLOPs")) == next(reached)


@given(steps=st.integers(1, 10**9), less=st.integers(0, 127))
def test_tokens_and_steps(steps: int, less: int) -> None:
    config = run_config("ar")  # 4 rows of 32
    assert steps_to(config, Amount(128 * steps - less, "tokens")) == steps
    assert steps_to(config, Amount(steps, "steps")) == steps


def test_a_budget_beyond_all_machine_integers() -> None:
    config = run_config("ar")
    cost = step_flops(config, 0)["model"]
    assert steps_to(config, Amount(10**30 * cost + 1, "EFLOPs")) == 10**30 + 1


def test_the_papers_count() -> None:
    config = load_run_config(CONFIGS / "paper" / "joint.yaml", ["budget.convention=paper"])
    assert step_flops(config, 0)["paper"] == 6 * 1_800_000_000 * 720_896
    assert flops_after(config, 10_000)["paper"] == 77_856_768 * 10**12
    assert steps_to(config, Amount.parse("77.856768 EFLOPs", "budget")) == 10_000
    assert steps_to(config, Amount(77_856_768 * 10**12 + 1, "EFLOPs")) == 10_001


@pytest.mark.parametrize("stage", ["vae", "joint", "ar", "llada"])
def test_by_default_the_paper_counts_the_backbone(stage: str) -> None:
    config = load_run_config(
        CONFIGS / "paper" / f"{stage}.yaml", ["budget.nominal_parameters=null"]
    )
    counted = {
        "vae": 193_715_744,
        "joint": 1_829_875_728,
        "ar": 1_812_051_968,
        "llada": 1_812_051_968,
    }
    assert step_flops(config, 0)["paper"] == 6 * counted[stage] * 720_896

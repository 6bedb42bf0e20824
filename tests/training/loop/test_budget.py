"""Budgets: a run ends at the exact step, counts every step once whatever happens to it, and keeps
and exports its marks.
"""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.settings import UserError
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.costs import flops_after, step_flops
from cola_train.training.callbacks import saver
from cola_train.training.checkpoints.folder import (
    latest_checkpoint,
    read_manifest,
    saved_steps,
    step_folder,
)
from cola_train.training.loop import step_log
from cola_train.training.loop.budget import Budget
from cola_train.training.loop.state import RunState
from cola_train.training.run import train
from tests.helpers.runs import figures, saved_tensors

# Frozen and joint steps cost differently: 2 of each in turn.
INTERVAL = [
    "objective.vae_strategy.mode=interval",
    "objective.vae_strategy.joint_steps=2",
    "objective.vae_strategy.frozen_steps=2",
]
Configs = Callable[..., JointRunConfig]


def eflops(flops: int) -> str:
    return f"budget.eflops={flops / FLOPS_PER_EFLOP!r}"


@pytest.mark.parametrize("convention", ["paper", "model", "executed"])
def test_a_run_ends_at_the_first_step_that_reaches_its_budget(
    joint_config: Configs, convention: str
) -> None:
    count = f"budget.convention={convention}"
    unbounded = joint_config("x", "trainer.max_steps=1000", count, *INTERVAL)
    after_seven = sum(step_flops(unbounded, step)[convention] for step in range(7))
    exact = joint_config("exact", "trainer.max_steps=1000", count, eflops(after_seven), *INTERVAL)
    assert Budget(exact).last_step == 7
    status = train(exact)
    assert (status.state, status.step) == ("finished", 7)
    more = joint_config(
        "more", "trainer.max_steps=1000", count, eflops(round(after_seven * 1.001)), *INTERVAL
    )
    assert train(more).step == 8
    folder = Path(exact.runs_folder) / "exact"
    assert read_manifest(step_folder(folder, 7)).state.flops == flops_after(exact, 7)
    row = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert row["eflops_" + convention] * FLOPS_PER_EFLOP == pytest.approx(after_seven, rel=1e-12)
    assert row["tokens"] == 7 * 4 * 32
    assert (
        json.loads((folder / "summary.json").read_text())["eflops"][convention]
        == row["eflops_" + convention]
    )


def test_an_interrupted_run_ends_with_the_same_eflops_and_weights(
    joint_config: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = eflops(flops_after(joint_config("x", *INTERVAL), 19)["model"])
    settings = ["trainer.max_steps=1000", "checkpoint.every_steps=4", budget, *INTERVAL]
    whole = joint_config("whole", *settings)
    assert train(whole).step == 19
    stops = sorted(random.Random(4).sample(range(1, 19), 3))
    broken = joint_config("broken", *settings)
    write = step_log.StepLog.write

    def interrupt(self: step_log.StepLog, step: step_log.Step) -> None:
        write(self, step)
        if stops and step.step == stops[0]:
            stops.pop(0)
            # The third goes as a killed run does: what came after its last checkpoint is done, and
            # counted, again.
            if not stops:
                raise RuntimeError("killed")
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(step_log.StepLog, "write", interrupt)
    ends = [train(broken).state for _ in range(2)]
    with pytest.raises(RuntimeError, match="killed"):
        train(broken)
    ends.append(train(broken).state)
    assert ends == ["interrupted", "interrupted", "finished"]
    found = []
    for config in (whole, broken):
        run = Path(config.runs_folder) / config.name
        folder = latest_checkpoint(run)
        assert folder is not None
        found.append((read_manifest(folder).state, saved_tensors(run), figures(run)))
    assert found[0][0] == found[1][0]
    assert found[0][0].flops == flops_after(whole, 19)
    assert all(found[0][1][name].equal(found[1][1][name]) for name in found[0][1])
    assert found[0][2] == found[1][2]


def test_marks_of_every_unit_are_kept_exported_and_validated(joint_config: Configs) -> None:
    three = flops_after(joint_config("x"), 3)["model"] / FLOPS_PER_EFLOP
    marks = f"budget.marks=['2 steps','{three!r} EFLOPs','every {5 * 4 * 32} tokens']"
    config = joint_config(
        "marked",
        "trainer.max_steps=11",
        "checkpoint.keep=1",
        "checkpoint.every_steps=4",
        "trainer.validate_every_steps=100",
        marks,
    )
    assert train(config).step == 11
    run = Path(config.runs_folder) / "marked"
    assert saved_steps(run) == [2, 3, 5, 10, 11]
    assert sorted(path.name for path in (run / "marks").iterdir()) == [
        f"step-{step:08d}" for step in (2, 3, 5, 10)
    ]
    assert ColaCheckpoint.load(run / "marks" / "step-00000003").training["step"] == 3
    validated = {step for step, name in figures(run) if name == "validation/loss"}
    assert validated == {2, 3, 5, 10}


def test_a_mark_that_could_not_be_exported_is_exported_at_the_end(
    vae_config: Callable[..., VAERunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr(saver, "export_marks", refuse)
    config = vae_config("full", "budget.marks=['2 steps']")
    train(config)
    assert (Path(config.runs_folder) / "full" / "marks" / "step-00000002" / "cola_dlm").is_dir()


def test_a_larger_budget_goes_on_with_a_finished_run(joint_config: Configs) -> None:
    cost = flops_after(joint_config("x"), 4)["model"]
    assert train(joint_config("run", "trainer.max_steps=1000", eflops(cost))).step == 4
    assert train(joint_config("run", "trainer.max_steps=1000", eflops(cost))).step == 4
    assert train(joint_config("run", "trainer.max_steps=1000", eflops(2 * cost))).step == 8


def test_counters_add_up_whole_flops(joint_config: Configs) -> None:
    config, state = joint_config("x", *INTERVAL), RunState()
    budget = Budget(config)
    for _ in range(9):
        budget.spend(state)
    assert (state.step, state.tokens, state.flops) == (9, 9 * 4 * 32, flops_after(config, 9))
    assert RunState.from_json(state.to_json()) == state


@pytest.mark.parametrize(
    "override, message",
    [
        ("budget.eflops=0", "budget.eflops must be above 0 or null, not 0.0"),
        ("budget.marks=[often]", "budget.marks must be an amount such as"),
        ("budget.nominal_parameters=-1", "budget.nominal_parameters must be at least 1 or null"),
        ("budget.convention=papers", "budget.convention"),
    ],
)
def test_a_wrong_budget_is_refused(joint_config: Configs, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        joint_config("x", override)

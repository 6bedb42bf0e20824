"""A step that is not finite or far out is not taken, on any process; too many in a row end the run
and cost nothing saved.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cola_train.config.load import to_yaml
from cola_train.config.loop import GuardConfig
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.run_folder import Status, read_status
from cola_train.run_layout import ALARM_LOG, folder_of
from cola_train.training.checkpoints.folder import intact_manifest, latest_checkpoint, saved_steps
from cola_train.training.loop.guard import (
    RunStoppedError,
    UsualLoss,
    count_skipped,
    count_taken,
    reason_to_skip,
)
from cola_train.training.loop.state import RunState
from cola_train.training.loop.step_log import Step, read_step_log
from cola_train.training.run import train
from tests.helpers.programs import as_torchrun
from tests.helpers.runs import figures, saved_tensors


def test_what_is_not_finite_is_named() -> None:
    figures = {"loss": 1.0, "flow_mse": math.inf, "gradient_norm": math.nan}
    assert (
        reason_to_skip(GuardConfig(), figures, None)
        == "not finite: flow_mse = inf, gradient_norm = nan"
    )
    assert reason_to_skip(GuardConfig(), {"loss": 1e30, "gradient_norm": 0.0}, None) is None


def test_a_spike_is_skipped_where_asked_for_and_named() -> None:
    usual, asked = UsualLoss(2.0, 0.1), GuardConfig(spike_deviations=5)
    assert reason_to_skip(asked, {"loss": 2.6}, usual) == "loss spike: 2.6 above 2 + 5 x 0.1"
    assert reason_to_skip(asked, {"loss": 2.5}, usual) is None
    assert reason_to_skip(asked, {"loss": 1e9}, None) is None
    assert reason_to_skip(GuardConfig(), {"loss": 1e9}, usual) is None
    assert reason_to_skip(asked, {"loss": math.nan}, usual) == "not finite: loss = nan"


def test_a_taken_step_ends_a_row_of_skipped_ones() -> None:
    config, state = GuardConfig(max_skipped_in_a_row=3), RunState(step=7)
    count_skipped(config, state, "x")
    count_skipped(config, state, "x")
    count_taken(state, "a", 20, 1.0)
    count_skipped(config, state, "x")
    count_skipped(config, state, "x")
    with pytest.raises(
        RunStoppedError, match=r"step 7 was not taken \(x\), like the 2 before it; after 3 in a row"
    ):
        count_skipped(config, state, "x")
    assert state.skipped_steps == 5


def test_the_counters_survive_being_saved_to_the_bit() -> None:
    state = RunState(step=3, skipped_steps=1, recent_losses={"a": [0.1 + 0.2, 1 / 3, 1e-300]})
    assert RunState.from_json(state.to_json()) == state


def poisoned_run(config: VAERunConfig, tmp_path: Path, *steps: int) -> tuple[int, str]:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    done = as_torchrun(
        2, "tests.training.poison", str(tmp_path / "config"), "nan", *map(str, steps)
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_nan_in_one_process_skips_the_step_on_all_and_the_run_goes_on(
    vae_config: Callable[..., VAERunConfig], tmp_path: Path
) -> None:
    config = vae_config(
        "run",
        "trainer.micro_batch_size=2",
        "trainer.max_steps=10",
        "checkpoint.every_steps=1",
        "checkpoint.keep=20",
    )
    returned, errors = poisoned_run(config, tmp_path, 1, 4, 5)
    assert returned == 0, errors[-3000:]
    run = folder_of(config)
    assert read_status(run) == Status("finished", 10)
    skipped = {
        entry.step: entry.skipped
        for entry in read_step_log(run)
        if isinstance(entry, Step) and entry.skipped
    }
    assert skipped == dict.fromkeys((2, 5, 6), "not finite: gradient_norm = nan")
    assert errors.count("is not taken, on any process") == 3
    assert figures(run)[10, "train/skipped_steps"] == 3
    assert saved_steps(run) == list(range(1, 11))
    weights = {}
    for step in saved_steps(run):
        name = "model.vae.decoder.final_layer.weight"
        tensors = saved_tensors(run, step)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
        weights[step] = tensors[name]
    for step in range(2, 11):
        # A skipped step leaves the weights as they were; all others move them.
        assert torch.equal(weights[step], weights[step - 1]) == (step in (2, 5, 6))
    exported = load_file(run / "hf" / "cola_dlm" / "cola_vae" / "model.safetensors")
    assert torch.equal(exported["decoder.final_layer.weight"], weights[10])


@pytest.mark.slow
def test_five_in_a_row_stop_the_run_with_the_last_good_checkpoint_intact(
    vae_config: Callable[..., VAERunConfig], tmp_path: Path
) -> None:
    config = vae_config(
        "run", "trainer.micro_batch_size=2", "trainer.max_steps=12", "checkpoint.every_steps=3"
    )
    returned, errors = poisoned_run(config, tmp_path, 4, 5, 6, 7, 8)
    assert returned == 1  # torchrun's, whatever the process'
    run = folder_of(config)
    assert (
        "step 8 was not taken (not finite: gradient_norm = nan), like the 4 before it; after 5 in "
        "a row" in errors
    )
    status = read_status(run)
    assert status is not None
    assert (status.state, status.step) == ("stopped", 8)
    latest = latest_checkpoint(run)
    assert latest is not None
    assert intact_manifest(latest).state.skipped_in_a_row in (0, 2)
    # With the cause gone, the same run goes on from there, in another number of processes.
    assert train(config) == Status("finished", 12)


def test_a_spike_is_skipped_told_of_and_kept_out_of_the_window_which_survives_a_resume(
    joint_config: Callable[..., JointRunConfig],
) -> None:
    # A learning rate far too high makes the loss jump about.
    guard = [
        "optim.learning_rate=0.1",
        "guard.spike_deviations=0.25",
        "guard.spike_window=10",
        "guard.max_skipped_in_a_row=20",
        "alarms.spike_deviations=0.25",
        "alarms.clear_after=1",
        "checkpoint.every_steps=7",
        "trainer.log_every_steps=1",
    ]
    whole = joint_config("whole", *guard, "trainer.max_steps=28", "optim.decay=30")
    train(whole)
    part = [*guard, "optim.decay=30"]
    train(joint_config("part", *part, "trainer.max_steps=14"))
    train(joint_config("part", *part, "trainer.max_steps=28"))
    run = folder_of(whole)
    assert figures(run) == figures(folder_of(joint_config("part")))
    skipped = {
        entry.step: entry.skipped
        for entry in read_step_log(run)
        if isinstance(entry, Step) and entry.skipped
    }
    # Before and after the resume.
    assert min(skipped) <= 14 < max(skipped)
    assert all(text.startswith("loss spike: ") for text in skipped.values())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("train/skipped_steps", 0) for line in lines) == len(skipped)
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    latest = latest_checkpoint(run)
    assert latest is not None
    (recent,) = intact_manifest(latest).state.recent_losses.values()
    assert recent == [loss for step, loss in losses.items() if step not in skipped][-10:]
    # The guard and the alarm, asked for as many deviations, see the same spikes.
    alarms = [json.loads(line) for line in (run / ALARM_LOG).read_text().splitlines()]
    raised = {line["step"] for line in alarms if line["alarm"] == "loss_spike" and line["raised"]}
    assert raised == {step for step in skipped if step - 1 not in skipped}

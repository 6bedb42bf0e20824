"""Chaos: the small copy, the plan, the damage and the comparison one by one; and a real run,
disturbed three times.
"""

import dataclasses
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.load import load_config, to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.operations import chaos as module
from cola_train.operations import watched
from cola_train.operations.chaos import chaos, shrink
from cola_train.operations.faults import (
    Disturbance,
    corrupt,
    draw,
    inject,
    intact_steps,
    resumes_from,
)
from cola_train.operations.sameness import RunOutcome, compare
from cola_train.operations.watched import JobError, Rhythm, RunMonitor, TrainingProcesses
from cola_train.programs import start
from cola_train.run_layout import folder_of
from cola_train.training.checkpoints.folder import saved_steps, step_folder
from cola_train.training.loop.state import RunState
from cola_train.training.loop.step_log import Step
from cola_train.training.run import train
from tests.helpers.programs import ROOT

CONFIGS = ROOT / "configs"
RUNS = sorted(
    path for path in CONFIGS.glob("*/*.yaml") if path.stem.split("_")[0] in ("vae", "joint")
)
Report = pytest.CaptureFixture[str]


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(
        VAERunConfig if path.name.startswith("vae") else JointRunConfig, path, overrides
    )


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
@pytest.mark.parametrize("counts", [(1,), (2, 1, 4), (3, 2)])
def test_a_small_copy_keeps_what_the_run_is(path: Path, counts: tuple[int, ...]) -> None:
    config = load(path)
    small = shrink(config, counts, 60)
    assert type(small) is type(config)
    assert small.vae.dim <= 32
    kept = (
        "vocab_size",
        "patch_size",
        "block_size",
        "latent_dim",
        "bias",
        "qk_norm",
        "scaling_factor",
    )
    assert [getattr(small.vae, name) for name in kept] == [
        getattr(config.vae, name) for name in kept
    ]
    for name in ("data", "ema", "seed", "data_seed"):
        assert getattr(small, name) == getattr(config, name)
    assert small.trainer.precision == config.trainer.precision
    rows, micro = small.trainer.global_batch_size, small.trainer.micro_batch_size
    assert 4 <= rows <= 12
    assert all(rows % (micro * count) == 0 for count in counts)
    assert small.trainer.max_steps == 60
    assert small.checkpoint.every_steps == 5
    validated = {step for step in range(1, 61) if step % small.trainer.validate_every_steps == 0}
    saved = set(range(5, 61, 5))
    assert validated & saved
    assert validated - saved
    if isinstance(config, JointRunConfig):
        assert isinstance(small, JointRunConfig)
        assert dataclasses.replace(
            small.objective, reference_weight=0.0, vae_strategy=config.objective.vae_strategy
        ) == (dataclasses.replace(config.objective, reference_weight=0.0))
        mode = config.objective.vae_strategy.mode
        assert small.objective.vae_strategy.mode == ("joint" if mode == "fix" else mode)
        assert {small.objective.vae_strategy.trains_vae(step) for step in range(60)} == (
            {True, False} if mode == "interval" else {True}
        )
        assert small.dit.block_size == config.dit.block_size
    else:
        assert small.objective == config.objective  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name", ["paper/vae.yaml", "paper/joint.yaml", "ablations/joint_interval.yaml"]
)
def test_a_small_copy_is_a_config_that_can_be_saved(name: str, tmp_path: Path) -> None:
    small = shrink(
        load(CONFIGS / name, "parallel.num_processes=2", "trainer.micro_batch_size=4"), (2,), 60
    )
    (tmp_path / "config.yaml").write_text(to_yaml(small))
    assert load_config(type(small), tmp_path / "config.yaml") == small
    # The paper's batches are accumulated from smaller ones; so are the small copy's.
    assert small.trainer.global_batch_size == 2 * 2 * small.trainer.micro_batch_size


def test_what_does_not_fit_is_refused_before_anything_runs(
    joint_config: Callable[..., JointRunConfig], tmp_path: Path
) -> None:
    config = joint_config("run", "parallel.strategy=single")
    with pytest.raises(UserError, match="strategy=single is for one process, not 2"):
        shrink(config, (1, 2), 60)
    with pytest.raises(UserError, match=r"--processes must be numbers of at least 1, not \[2, 0\]"):
        shrink(config, (2, 0), 60)
    with pytest.raises(
        UserError, match=r"--kills must be from 1 to 52 in 60 steps, not 53; give more --steps"
    ):
        chaos(config, 53, None, 60, 0)
    with pytest.raises(UserError, match="There is no prepared data folder"):
        chaos(joint_config("run", "data.path=nowhere"), 3, None, 60, 0)
    assert not list(tmp_path.glob("run*"))


@given(st.integers(1, 60), st.integers(0, 200), st.integers())
def test_disturbances_are_of_every_kind_and_spread_over_the_run(
    number: int, more: int, seed: int
) -> None:
    last = number + more
    plan = draw(number, last, random.Random(seed))
    assert plan == draw(number, last, random.Random(seed))
    steps = [disturbance.step for disturbance in plan]
    assert steps == sorted(steps)
    assert all(
        index * last / number < step <= (index + 1) * last / number + 1
        for index, step in enumerate(steps)
    )
    assert 1 <= steps[0] <= steps[-1] <= last
    kinds = Counter(disturbance.kind for disturbance in plan)
    assert all(
        kinds[kind] in (number // 3, number // 3 + 1)
        for kind in ("kill", "kill in a save", "SIGTERM")
    )
    assert all(disturbance.corrupt is None for disturbance in plan if disturbance.kind == "SIGTERM")


@pytest.fixture
def three_checkpoints(vae_config: Callable[..., VAERunConfig]) -> Path:
    config = vae_config(
        "run", "trainer.max_steps=3", "checkpoint.every_steps=1", "trainer.validate_every_steps=0"
    )
    train(config)
    return folder_of(config)


def test_damage_is_done_to_the_newest_while_an_older_one_is_intact(three_checkpoints: Path) -> None:
    run, chance = three_checkpoints, random.Random(0)
    assert (intact_steps(run), resumes_from(run)) == ([1, 2, 3], 3)
    (text,) = corrupt(run, "one bit flipped", chance)
    assert text.startswith("step-00000003/")
    assert text.endswith(" one bit flipped")
    assert (intact_steps(run), resumes_from(run)) == ([1, 2], 2)
    # The run sets aside what is damaged.
    step_folder(run, 3).rename(run / "aside")
    (text,) = corrupt(run, "truncated", chance)
    assert (text.split("/")[0], intact_steps(run)) == ("step-00000002", [1])
    step_folder(run, 2).rename(run / "aside2")
    assert corrupt(run, "deleted", chance) == []
    assert (intact_steps(run), resumes_from(run)) == ([1], 1)


@pytest.mark.parametrize("seed", range(4))
def test_deleted_and_flipped_files_are_found_whichever_they_are(
    seed: int, three_checkpoints: Path
) -> None:
    for how in ("deleted", "one bit flipped"):
        corrupt(three_checkpoints, how, random.Random(seed))
        assert resumes_from(three_checkpoints) == 2


def test_a_run_that_is_not_there_resumes_from_nothing(tmp_path: Path) -> None:
    assert resumes_from(tmp_path / "nothing") == 0


def ending(**changes: Any) -> RunOutcome:
    made = RunOutcome(
        tensors={
            "model.a": torch.tensor([1.0, -3.0]),
            "model.b": torch.tensor(0.0),
            "exp_avg.a": torch.tensor([0.1]),
        },
        state=RunState(step=2),
        metrics={(1, "train/loss"): 2.0, (2, "train/loss"): 1.0, (2, "train/gradient_norm"): None},
        steps={1: Step(1, 4, "aa"), 2: Step(2, 4, "bb")},
    )
    return dataclasses.replace(made, **changes)


def test_equal_endings_pass() -> None:
    for exact in (True, False):
        found = compare(ending(), ending(), exact=exact)
        assert found.passed
        assert found.lines == (
            "weights               equal to the bit: 2 tensors",
            "optimizer and average equal to the bit: 1 tensors",
            "counters              equal to the bit",
            "metrics               equal to the bit: 3 metrics",
            "samples and noise     equal in 2 steps",
        )


TENSORS = ending().tensors
LAST_BIT = TENSORS | {"model.a": torch.nextafter(TENSORS["model.a"], torch.tensor(5.0))}
METRICS = ending().metrics


@pytest.mark.parametrize(
    "changes, line, passes_if_not_exact",
    [
        (
            {"tensors": LAST_BIT},
            "weights               1 of 2 tensors differ, the most by 7.9e-08 of its largest",
            True,
        ),
        (
            {"tensors": TENSORS | {"model.b": torch.tensor(1.0)}},
            "weights               1 of 2 tensors differ, the most by inf",
            True,
        ),
        (
            {"tensors": TENSORS | {"exp_avg.a": torch.tensor([0.2])}},
            "optimizer and average 1 of 1 tensors differ",
            True,
        ),
        (
            {"tensors": {**TENSORS, "average.a": torch.tensor(0.0)}},
            "differ in names: ['average.a']",
            False,
        ),
        ({"state": RunState(step=2, skipped_steps=1)}, "counters              differ", True),
        (
            {"metrics": METRICS | {(2, "train/loss"): 1.00005}},
            "losses at most by 5.0e-05 of their value, (2, 'train/loss')",
            True,
        ),
        ({"metrics": METRICS | {(2, "train/loss"): 1.0002}}, "losses at most by 2.0e-04", False),
        ({"metrics": METRICS | {(2, "train/loss"): None}}, "losses at most by inf", False),
        (
            {"metrics": METRICS | {(2, "train/gradient_norm"): 5.0}},
            "1 of 3 metrics differ, first (2, 'train/g",
            True,
        ),
        (
            {"metrics": METRICS | {(3, "train/loss"): 1.0}},
            "1 metrics are in one run only, first (3, 'train/loss')",
            False,
        ),
        (
            {"steps": {1: Step(1, 4, "aa"), 2: Step(2, 4, "cc")}},
            "samples and noise     differ in 1 steps, first in 2",
            False,
        ),
        (
            {"steps": {1: Step(1, 4, "aa")}},
            "samples and noise     differ in 1 steps, first in 2",
            False,
        ),
    ],
)
def test_what_differs_is_said_and_fails(
    changes: dict[str, Any], line: str, passes_if_not_exact: bool
) -> None:
    found = compare(ending(), ending(**changes), exact=True)
    assert not found.passed
    assert any(line in text and text.endswith("<-- must not be") for text in found.lines), (
        found.lines
    )
    assert compare(ending(), ending(**changes), exact=False).passed == passes_if_not_exact


def in_process(runs: module._Runs, name: str) -> None:
    config = dataclasses.replace(runs._config, name=name)
    train(config)


def test_one_changed_weight_fails_the_whole_thing(
    joint_config: Callable[..., JointRunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Report
) -> None:
    def undisturbed(runs: module._Runs) -> Rhythm:
        in_process(runs, "undisturbed")
        return Rhythm(0.1, 0.1)

    monkeypatch.setattr(module._Runs, "undisturbed", undisturbed)
    monkeypatch.setattr(
        module._Runs, "disturbed", lambda runs, *rest: in_process(runs, "disturbed")
    )
    config = joint_config("run")
    assert chaos(config, 2, None, 12, 0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("chaos of run: 2 disturbances in 12 steps, seed 0; all in ")
    assert lines[-1].startswith("PASSED: 2 disturbances; all in ")
    folder = Path(lines[-1].rpartition(" in ")[2])
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "disturbed",
        "undisturbed",
    ]
    read = RunOutcome.read

    def altered(run: Path) -> RunOutcome:
        found = read(run)
        if run.name == "disturbed":
            found.tensors["model.vae.encoder.wte.weight"].view(-1)[0].mul_(1 + 2**-20)
        return found

    assert "model.vae.encoder.wte.weight" in read(folder / "disturbed").tensors
    monkeypatch.setattr(RunOutcome, "read", altered)
    monkeypatch.setattr(time, "strftime", lambda form: "again")
    assert chaos(config, 2, None, 12, 0) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("FAILED: 2 disturbances; all in ")
    assert sum(line.endswith("<-- must not be") for line in lines) == 1


def test_a_job_that_fails_fails_the_whole_thing(
    joint_config: Callable[..., JointRunConfig], monkeypatch: pytest.MonkeyPatch, capsys: Report
) -> None:
    def undisturbed(runs: module._Runs) -> Rhythm:
        raise JobError("it ended with exit status 1")

    monkeypatch.setattr(module._Runs, "undisturbed", undisturbed)
    assert chaos(joint_config("run"), 2, None, 12, 0) == 1
    assert capsys.readouterr().out.splitlines()[-2] == "FAILED: it ended with exit status 1"


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "output.log"
    with TrainingProcesses(["joint", str(tmp_path / "absent.yaml")], run, log) as job:
        monitor = RunMonitor(job, run)
        assert not monitor.until(lambda: monitor.step > 0)
        assert job.ended == 2
        with pytest.raises(
            JobError,
            match=(
                r"(?s)the run ended at step 0, before .*the end of .*output.log.*There is no "
                r"config file"
            ),
        ):
            inject(
                job, monitor, Disturbance("kill", 1, 0.0, None), Rhythm(0.0, 0.0), random.Random(0)
            )


def test_a_job_that_hangs_is_ended_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sleeper.py").write_text(
        "import subprocess, sys, time\n"
        "code = 'import time; time.sleep(600)'\n"
        "subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "print('asleep', flush=True)\n"
        "time.sleep(600)\n"
    )

    def sleep(module: str, arguments: Any, streams: Any, **how: Any) -> Any:
        how["environment"] = {**how["environment"], "PYTHONPATH": str(tmp_path)}
        return start("sleeper", arguments, streams, **how)

    monkeypatch.setattr(watched, "start", sleep)
    monkeypatch.setattr(watched, "_QUIET_SECONDS", 1.0)
    log = tmp_path / "output.log"
    with TrainingProcesses([], tmp_path / "run", log) as job:
        while "asleep" not in log.read_text():
            time.sleep(0.05)
        (child,) = job._launcher.children()
        with pytest.raises(JobError, match="it still runs after 0 s"):
            job.wait(0.1)
        monitor = RunMonitor(job, tmp_path / "run")
        with pytest.raises(
            JobError, match=r"no step has been done for 1 s; the end of .*\n  asleep"
        ):
            monitor.until(lambda: False)
    assert not job._launcher.is_running()
    assert watched._is_gone(child)


@pytest.mark.slow
def test_a_run_disturbed_three_times_comes_to_the_same(
    joint_config: Callable[..., JointRunConfig], capsys: Report
) -> None:
    config = joint_config(
        "run",
        "parallel.num_processes=2",
        "trainer.micro_batch_size=1",
        "ema.decay=0.9",
        "ema.evaluate=true",
    )
    status = chaos(config, 3, None, 24, seed=2)
    text = capsys.readouterr().out
    sys.stdout.write(text)  # shown where a line below fails
    assert status == 0
    lines = text.splitlines()
    place = next(
        number for number, line in enumerate(lines) if line.startswith("  no.  disturbance")
    )
    told = lines[place + 1 : place + 4]
    assert {line[7:21].strip() for line in told} == {"kill", "kill in a save", "SIGTERM"}
    assert all("; on from step " in line for line in told)
    assert [line for line in lines if line.startswith(("weights ", "samples "))] == [
        "weights               equal to the bit: 76 tensors",
        "samples and noise     equal in 24 steps",
    ]
    assert "attempts  4: 4 with 2 processes" in lines
    assert lines[-1].startswith("PASSED: 3 disturbances; all in ")
    folder = Path(lines[-1].rpartition(" in ")[2])
    assert saved_steps(folder / "disturbed")[-1] == 24
    ranks = [
        number for path in folder.rglob("processes.json") for number in json.loads(path.read_text())
    ]
    assert len(ranks) == 2 * 5
    assert not [number for number in ranks if psutil.pid_exists(number)]

"""Whatever ends a run is in its status; what is only told or looked at ends none."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cola_train.config.settings import UserError
from cola_train.data.batch import Batch
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.run_folder import Status, locked, read_status, write_status, write_unsaid_end
from cola_train.run_layout import folder_of
from cola_train.training import run as run_module
from cola_train.training.callbacks import in_loop_evaluation, metrics
from cola_train.training.data import RunData
from cola_train.training.loop.ending import explained
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.watchdog import Watchdog
from cola_train.training.run import train
from tests.helpers.programs import ROOT

VAEConfigs = Callable[..., VAERunConfig]
JointConfigs = Callable[..., JointRunConfig]


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something as the run's n-th step begins."""
    real = StageModule.training_step

    def training_step(stage: StageModule, batch: Batch, batch_idx: int) -> None:
        if stage.state.step == step - 1:
            act()
        real(stage, batch, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", training_step)


def written(config: VAERunConfig | JointRunConfig) -> Status:
    """What status.json says, whoever holds the run."""
    return Status(**json.loads((folder_of(config) / "status.json").read_text()))


@contextlib.contextmanager
def stderr(monkeypatch: pytest.MonkeyPatch, kind: str) -> Iterator[Callable[[], None]]:
    """A console that fails once the function that is given is called: a full disk fails always."""
    read, write = os.pipe() if kind == "pipe" else pty.openpty()
    if kind == "full disk":
        os.close(write)
        write = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        yield lambda: os.close(read)
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full disk"])
def test_a_console_that_fails_ends_no_run(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = vae_config("vae", "trainer.max_steps=3")
    with stderr(monkeypatch, kind) as close:
        at_step(monkeypatch, 2, close)
        assert train(config) == Status("finished", 3)
    assert read_status(folder_of(config)) == Status("finished", 3)


def test_a_terminal_that_closes_saves_and_says_so(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("vae")

    with stderr(monkeypatch, "terminal") as close:

        def hang_up() -> None:
            close()
            os.kill(os.getpid(), signal.SIGHUP)

        at_step(monkeypatch, 2, hang_up)
        assert train(config) == Status("interrupted", 2, "SIGHUP")
    assert read_status(folder_of(config)) == Status("interrupted", 2, "SIGHUP")


def test_the_status_is_written_before_it_is_told(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, told = vae_config("vae", "trainer.max_steps=1"), []
    monkeypatch.setattr(run_module, "say", lambda text: told.append(written(config)))
    train(config)
    assert told == [Status("finished", 1)]


def test_a_second_ctrl_c_leaves_a_true_status(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("vae")

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 5, twice)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    # The last checkpoint is that of step 3.
    assert written(config).state == "interrupted"
    assert written(config).step == 3
    monkeypatch.undo()
    assert train(config) == Status("finished", 6)


def test_an_export_that_fails_at_the_end_leaves_a_true_status(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("vae", "trainer.max_steps=1")

    def full(*args: object, **rest: object) -> None:
        raise UserError("Cannot write hf: No space left on device.")

    monkeypatch.setattr(run_module, "export_checkpoint", full)
    with pytest.raises(UserError, match="No space left"):
        train(config)
    assert written(config) == Status("failed", 1, "Cannot write hf: No space left on device.")
    monkeypatch.undo()
    assert train(config) == Status("finished", 1)
    assert (folder_of(config) / "hf" / "training.json").is_file()


def test_the_first_error_is_the_reason_not_what_fails_in_cleaning_up(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("vae")

    class NoReader:
        def __iter__(self) -> Iterator[None]:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunData, "train_loader", lambda *args: NoReader())
    with pytest.raises(OSError, match="No space left on device"):
        train(config)
    assert written(config) == Status("failed", 0, "[Errno 28] No space left on device")


@pytest.mark.parametrize(
    "text",
    [
        "unable to write to file </torch_12_34>: No space left on device (28)",
        "DataLoader worker (pid 5) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_shared_memory_that_is_full_is_named(text: str) -> None:
    stage: Any = SimpleNamespace(
        processes=SimpleNamespace(rank=0, world_size=1),
        state=SimpleNamespace(step=0),
        watchdog=SimpleNamespace(doing="starting"),
        config=SimpleNamespace(
            data=SimpleNamespace(num_workers=2), trainer=SimpleNamespace(global_batch_size=4)
        ),
    )
    error = RuntimeError("caught in a worker")
    error.__context__ = RuntimeError(text)
    assert str(explained(error, stage)).startswith(
        "/dev/shm has no room for data.num_workers=2: give the container more (docker run "
        "--shm-size), or set data.num_workers=0."
    )


def test_a_process_that_hangs_tells_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr("cola_train.training.loop.watchdog._SECONDS_FOR_OTHERS", 0.2)
    monkeypatch.setattr("faulthandler.dump_traceback", lambda file: None)
    told: list[str] = []
    watchdog = Watchdog(rank=1, timeout_seconds=7)
    watchdog.tell = told.append
    watchdog._end(waited=8.0)
    assert ended == [1]
    assert told == ["rank 1 has been starting for 8 s, longer than parallel.timeout_seconds (7)"]


def test_a_process_that_was_stopped_for_long_does_not_hang() -> None:
    lines = [
        "import time",
        "from cola_train.training.loop.watchdog import Watchdog",
        "with Watchdog(0, 1.0) as watchdog:",
        "    for step in range(16):",
        "        print(step, flush=True)",
        "        time.sleep(0.1)",
        "        watchdog.beat('in a step')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(30) == 0


def test_what_a_killed_process_could_not_say_is_said_once(tmp_path: Path) -> None:
    write_status(tmp_path, Status("running", 3))
    for reason in ("process 0 was ended by SIGKILL", "nothing more"):
        write_unsaid_end(tmp_path, Status("failed", 5, reason))
        assert read_status(tmp_path) == Status("failed", 5, "process 0 was ended by SIGKILL")


def test_a_run_that_another_took_over_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_train.run_folder._LOCK_WAIT_SECONDS", 0.0)
    write_status(tmp_path, Status("running", 3))
    with locked(tmp_path):
        write_unsaid_end(tmp_path, Status("failed", 5, "process 0 was ended by SIGKILL"))
        assert read_status(tmp_path) == Status("running", 3)


def test_a_plot_that_fails_ends_no_run(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*paths: Path) -> None:
        raise ValueError("no such backend")

    monkeypatch.setattr(metrics, "draw_losses", broken)
    assert train(vae_config("vae", "trainer.max_steps=1")) == Status("finished", 1)
    assert "were not drawn: ValueError: no such backend" in capsys.readouterr().err


def test_a_logger_that_fails_is_given_up(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = SimpleNamespace(calls=0)

    def log_metrics(values: object, step: int) -> None:
        logger.calls += 1
        raise ConnectionError("no network")

    logger.log_metrics = log_metrics
    monkeypatch.setattr(metrics, "_wandb_loggers", lambda *args: [logger])
    assert train(vae_config("vae", "trainer.max_steps=2")) == Status("finished", 2)
    assert logger.calls == 1
    assert "wandb gets nothing more of this run: no network" in capsys.readouterr().err


def test_an_evaluation_for_which_there_is_no_memory_ends_no_run(
    joint_config: JointConfigs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_large(*args: object, **rest: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(in_loop_evaluation, "plain_copy", too_large)
    config = joint_config(
        "joint",
        "trainer.max_steps=2",
        "trainer.sample_every_steps=1",
        "in_loop_eval.every_steps=1",
        "in_loop_eval.evaluators=[likelihood]",
    )
    assert train(config) == Status("finished", 2)
    said = capsys.readouterr().err
    for step in (1, 2):
        assert f"no evaluation after step {step}: OutOfMemoryError: CUDA out of memory" in said
        assert f"no sample texts after step {step}: OutOfMemoryError" in said

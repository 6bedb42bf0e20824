"""What goes wrong around a run: damaged files, a full disk, two at once, a hang, a dead reader.
Nothing that was saved is lost.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.data.batch import PackedRows
from cola_train.data.prepared import PreparedData, PreparedManifest
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.processes import STORE
from cola_train.programs import start
from cola_train.run_folder import Status, locked, read_status
from cola_train.run_layout import folder_of
from cola_train.training.callbacks import saver
from cola_train.training.checkpoints.folder import (
    intact_manifest,
    latest_checkpoint,
    saved_steps,
    step_folder,
)
from cola_train.training.run import export_run, train
from tests.helpers.programs import as_torchrun, clean_environment
from tests.helpers.runs import figures

VAEConfigs = Callable[..., VAERunConfig]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("*.safetensors", flip, r"shard-00001-.* has been altered: its checksum is not the manifest's"),
    (
        "*.safetensors",
        truncate,
        r"shard-00001-.* has \d+ bytes, the manifest says \d+: truncated or half-copied",
    ),
    ("*.safetensors", Path.unlink, r"shard-00001-.* is missing"),
    ("manifest.json", flip, r"manifest.json is damaged \("),
    ("manifest.json", Path.unlink, r"manifest.json is missing, so the checkpoint cannot be used"),
]


@pytest.mark.parametrize(("pattern", "spoil", "message"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used_if_asked(
    vae_config: VAEConfigs,
    pattern: str,
    spoil: Callable[[Path], None],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(vae_config("whole", "trainer.max_steps=8"))
    config = vae_config("run", "trainer.max_steps=6")
    train(config)
    run = folder_of(config)
    (path,) = step_folder(run, 6).glob(pattern)
    spoil(path)
    longer = vae_config("run", "trainer.max_steps=8")
    with pytest.raises(UserError, match=message) as caught:
        train(longer)
    assert (
        "Go on from the newest intact one with checkpoint.if_damaged=previous; the others are of "
        "steps [3]" in str(caught.value)
    )
    with pytest.raises(UserError, match=message):
        export_run(run, 6, run.parent / "out", 10**9)
    assert saved_steps(run) == [3, 6]
    train(vae_config("run", "trainer.max_steps=8", "checkpoint.if_damaged=previous"))
    assert (
        "damaged-step-00000006; going on from the checkpoint before it" in capsys.readouterr().err
    )
    assert saved_steps(run) == [3, 6, 8]
    assert (run / "lightning" / "damaged-step-00000006").is_dir()
    assert figures(run) == figures(run.parent / "whole")
    intact_manifest(step_folder(run, 6))


def test_a_damaged_only_checkpoint_is_not_started_over(vae_config: VAEConfigs) -> None:
    config = vae_config("run", "trainer.max_steps=3")
    train(config)
    (path,) = step_folder(folder_of(config), 3).glob("*.safetensors")
    path.unlink()
    with pytest.raises(
        UserError, match="The run has no other checkpoint: copy this one again from a backup"
    ):
        train(vae_config("run", "trainer.max_steps=8", "checkpoint.if_damaged=previous"))


def test_other_data_under_the_same_path_is_refused(
    vae_config: VAEConfigs, prepared_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows"
    shutil.copytree(prepared_folder, rows)
    train(vae_config("run", f"data.path={rows}", "trainer.max_steps=3"))
    manifest = rows / "manifest.json"
    was = PreparedManifest.from_json(manifest.read_text())
    manifest.write_text(dataclasses.replace(was, text_column="body").to_json())
    with pytest.raises(
        UserError, match=r"is not what .*run was trained on so far \(its manifest.json differs\)"
    ):
        train(vae_config("run", f"data.path={rows}"))
    # The same data elsewhere is the same data.
    assert train(vae_config("run", f"data.path={prepared_folder}")) == Status("finished", 6)


def test_what_a_run_writes_at_its_end_is_written_by_the_same_command(
    vae_config: VAEConfigs,
) -> None:
    config = vae_config("run")
    train(config)
    summary = folder_of(config) / "summary.json"
    before = json.loads(summary.read_text())
    summary.unlink()  # as where it was killed after its last save
    train(config)
    after = json.loads(summary.read_text())
    assert [after[name] for name in ("steps", "tokens", "eflops")] == [
        before[name] for name in ("steps", "tokens", "eflops")
    ]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path) -> Path:
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(b"\0" * 4096):
            pass
    return ballast


def full_at(step: int, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the disk when the save of `step` begins."""
    begin = saver.begin

    def begin_full(run_folder: Path, at: int) -> Path:
        working = begin(run_folder, at)
        if at == step:
            fill(disk)
        return working

    monkeypatch.setattr(saver, "begin", begin_full)


@pytest.mark.filterwarnings("ignore:Cannot write .*metrics.jsonl now")
@pytest.mark.filterwarnings("ignore:Cannot write .*steps.jsonl now")
def test_a_full_disk_fails_the_save_and_not_the_run(
    vae_config: VAEConfigs,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(vae_config("whole", "trainer.max_steps=12"))
    config = vae_config(
        "run", f"runs_folder={small_disk}", "trainer.max_steps=12", "checkpoint.keep=1"
    )
    run = folder_of(config)
    full_at(6, small_disk, monkeypatch)
    seen: list[list[int]] = []

    def freed(*arguments: Any) -> None:
        seen.append(saved_steps(run))
        if seen == [[3], [3]]:
            (small_disk / "ballast").unlink()

    monkeypatch.setattr(saver, "say", lambda text: (freed(), print(text)))
    full_at(6, small_disk, monkeypatch)
    assert train(config) == Status("finished", 12)
    out = capsys.readouterr().out
    assert (
        "the checkpoint of step 6 was not saved: No space left on device. Training goes on; the "
        "checkpoint of step 3" in out
    )
    assert "the checkpoint of step 9 was not saved: No space left on device" in out
    assert saved_steps(run) == [12]
    assert not list((run / "lightning").glob(".*"))
    # Not a line was lost meanwhile.
    assert figures(run) == figures(Path(vae_config("whole").runs_folder) / "whole")


@pytest.mark.filterwarnings("ignore:Cannot write")
def test_a_last_step_that_cannot_be_saved_says_so_and_the_run_goes_on_later(
    vae_config: VAEConfigs, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("run", f"runs_folder={small_disk}")
    run = folder_of(config)
    full_at(6, small_disk, monkeypatch)
    with pytest.raises(
        UserError,
        match=(
            r"ended at step 6 but that step could not be saved: No space left on device. The "
            r"checkpoint of"
        ),
    ):
        train(config)
    assert saved_steps(run) == [3]
    intact_manifest(step_folder(run, 3))
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    assert train(config) == Status("finished", 6)
    assert saved_steps(run) == [3, 6]


def hold_lock(folder: Path, ready: Any) -> None:
    with locked(folder):
        ready.set()
        time.sleep(60)


def test_two_processes_do_not_train_one_run(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("run", "trainer.max_steps=1")
    train(config)
    forks = multiprocessing.get_context("forkserver")
    ready = forks.Event()
    other = forks.Process(target=hold_lock, args=(folder_of(config), ready))
    other.start()
    try:
        assert ready.wait(60)
        monkeypatch.setattr("cola_train.run_folder._LOCK_WAIT_SECONDS", 0.5)
        with pytest.raises(
            UserError,
            match=r"Another process is training .*run; two would spoil each other's files",
        ):
            train(config)
    finally:
        other.kill()
        other.join()
    # A killed process holds nothing.
    assert train(config) == Status("finished", 1)


def write(config: RunConfig, tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return str(tmp_path / "config.yaml")


@contextlib.contextmanager
def running(config: RunConfig, tmp_path: Path) -> Iterator[BaseProcess]:
    """The user's command under way, once it has taken some steps; nothing of it is left behind."""
    verb = "joint" if isinstance(config, JointRunConfig) else "vae"
    with (tmp_path / "log.txt").open("wb") as log:
        streams = log.fileno(), log.fileno()
        arguments = [verb, write(config, tmp_path)]
        job = start("cola_train", arguments, streams, environment=clean_environment())
    try:
        deadline = time.monotonic() + 120
        steps = folder_of(config) / "steps.jsonl"
        while not steps.is_file() or steps.read_text().count("\n") < 4:
            assert job.is_alive(), (tmp_path / "log.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield job
    finally:
        for process in everyone(job, config):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.join()


def ended(job: BaseProcess, seconds: float = 60) -> int | None:
    job.join(seconds)
    return job.exitcode


def workers(config: RunConfig) -> list[psutil.Process]:
    """The training processes that are still there, by rank."""
    found = []
    for ranks in (folder_of(config) / "logs").rglob("processes.json"):
        for number in json.loads(ranks.read_text()):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(number))
    return found


def everyone(job: BaseProcess, config: RunConfig) -> list[psutil.Process]:
    """The processes of a run that are there: launcher, trainers, readers, what they came from."""
    found = workers(config)
    with contextlib.suppress(psutil.NoSuchProcess):
        found.append(psutil.Process(job.pid))
    for process in tuple(found):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.children(recursive=True)
    return [*dict.fromkeys(found)]


TWO = [
    "parallel.num_processes=2",
    "trainer.micro_batch_size=2",
    "trainer.max_steps=100000",
    "checkpoint.every_steps=20",
]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_process_saves_all_at_one_step(
    joint_config: Callable[..., JointRunConfig], tmp_path: Path, number: int
) -> None:
    config = joint_config("run", *TWO)
    with running(config, tmp_path) as job:
        started = time.monotonic()
        # SIGINT comes from a terminal, to the launcher; the others from a scheduler, to any
        # process.
        (psutil.Process(job.pid) if number == signal.SIGINT else workers(config)[1]).send_signal(
            number
        )
        assert ended(job) == 75
        assert time.monotonic() - started < 10
    status = read_status(folder_of(config))
    assert status is not None
    assert status.state == "interrupted"
    latest = latest_checkpoint(folder_of(config))
    assert latest == step_folder(folder_of(config), status.step)
    assert intact_manifest(latest).state.step == status.step


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_to_every_process_finds_those_that_read_still_there(
    vae_config: VAEConfigs, tmp_path: Path, processes: int
) -> None:
    config = vae_config("run", *TWO, "data.num_workers=1", f"parallel.num_processes={processes}")
    with running(config, tmp_path) as job:
        all_of_them = everyone(job, config)
        # One that reads for each that trains, and with several the launcher.
        assert len(all_of_them) >= 2 * processes + (processes > 1)
        for process in all_of_them:
            process.send_signal(signal.SIGTERM)
        assert ended(job) == 75, (tmp_path / "log.txt").read_text()
    status = read_status(folder_of(config))
    assert status is not None
    assert latest_checkpoint(folder_of(config)) == step_folder(folder_of(config), status.step)


@pytest.mark.slow
def test_a_launcher_stopped_before_any_step_does_not_end_as_if_done(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    config = vae_config("run", *TWO)
    with (tmp_path / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "cola_train", "vae", write(config, tmp_path)]
        job = subprocess.Popen(command, env=clean_environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not list((folder_of(config) / "logs").rglob("processes.json")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        all_of_them = psutil.Process(job.pid).children(recursive=True)
        job.send_signal(signal.SIGTERM)
        assert job.wait(60) == 128 + signal.SIGTERM
    finally:
        job.kill()  # what it started ends with it
        job.wait()
    assert psutil.wait_procs(all_of_them, timeout=10)[1] == []
    assert read_status(folder_of(config)) is None


@pytest.mark.slow
def test_processes_whose_launcher_is_killed_save_and_end_and_listen_to_nobody(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    config = vae_config("run", *TWO)
    with running(config, tmp_path) as job:
        all_of_them = everyone(job, config)
        listening = [
            connection.laddr.ip
            for process in all_of_them
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        ]
        assert {*listening} <= {"127.0.0.1", "::1"}
        assert len(all_of_them) >= 3
        job.kill()
        assert ended(job) == -signal.SIGKILL
        assert psutil.wait_procs(all_of_them, timeout=30)[1] == []
    status = read_status(folder_of(config))
    assert status is not None
    assert status.state == "interrupted"
    assert latest_checkpoint(folder_of(config)) == step_folder(folder_of(config), status.step)


@pytest.mark.slow
def test_a_process_that_waits_for_the_others_ends_at_a_signal(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    store, path = tmp_path / "store", write(vae_config("run", *TWO), tmp_path)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with (tmp_path / "log.txt").open("wb") as log:
        alone = start(
            "cola_train",
            ["vae", path],
            (log.fileno(), log.fileno()),
            environment={**clean_environment(), **place, STORE: str(store)},
        )
    try:
        deadline = time.monotonic() + 60
        while not store.is_file() or store.stat().st_size == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(alone.pid or 0, signal.SIGTERM)
        assert ended(alone, 10) == -signal.SIGTERM
    finally:
        alone.kill()


@pytest.mark.slow
def test_a_process_that_hangs_is_named_with_its_step(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    (tmp_path / "config").mkdir()
    config = vae_config("run", "trainer.micro_batch_size=2", "parallel.timeout_seconds=4")
    write(config, tmp_path / "config")
    done = as_torchrun(2, "tests.training.poison", str(tmp_path / "config"), "hang", "4")
    assert done.returncode == 1
    for rank in (0, 1):
        assert (
            f"cola-train: error: rank {rank} has been in the forward or backward of step 5 for"
            in done.stderr
        )
    assert "longer than parallel.timeout_seconds (4)" in done.stderr
    # The stacks say who waits for whom.
    assert "poison.py" in done.stderr
    intact_manifest(step_folder(folder_of(config), 3))


@pytest.mark.slow
def test_a_process_that_dies_is_reported_by_the_others(
    joint_config: Callable[..., JointRunConfig], tmp_path: Path
) -> None:
    config = joint_config("run", *TWO)
    with running(config, tmp_path) as job:
        workers(config)[1].kill()
        # Of whichever is seen to end first: the killed one, or the one that lost it.
        assert ended(job) in (137, 2)
    text = (tmp_path / "log.txt").read_text()
    assert re.search(
        r"cola-train: error: Rank 0 lost another process of the run while .* \(step \d+\)", text
    ), text
    assert "run the same command again to go on from it" in text
    assert latest_checkpoint(folder_of(config)) is None or intact_manifest(
        latest_checkpoint(folder_of(config))
    )  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_dead_data_worker_is_reported_with_its_samples(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = PackedRows.__getitem__

    def dies(rows: PackedRows, positions: list[int]) -> Any:
        if positions[0] >= 12:
            os._exit(3)
        return read(rows, positions)

    monkeypatch.setattr(PackedRows, "__getitem__", dies)
    config = vae_config("run", "data.num_workers=1")
    with pytest.raises(
        UserError,
        match=(
            r"(?s)Rank 0: a process that reads data died.*step \d waited for its rows, samples \d+ "
            r"to \d+"
        ),
    ):
        train(config)
    status = read_status(folder_of(config))
    assert status is not None
    assert status.state == "failed"


@pytest.mark.slow
def test_a_reader_that_fails_is_reported_with_the_row(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(prepared: PreparedData, split: str, index: int) -> Any:
        raise OSError("Input/output error")

    monkeypatch.setattr(PreparedData, "row", fails)
    message = (
        r"OSError: Input/output error; while reading row \d+ of the split 'train' of .*, sample 0"
    )
    with pytest.raises(UserError, match=message):
        train(vae_config("run", "data.num_workers=1"))


def test_threads_that_train_take_no_signals(vae_config: VAEConfigs) -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=train, args=(vae_config("run", "trainer.max_steps=1"),))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
    assert read_status(folder_of(vae_config("run"))) == Status("finished", 1)

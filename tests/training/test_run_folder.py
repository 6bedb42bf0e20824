"""A run is the folder that was given, wherever it lies and whatever it is called; one at a time may
act on it, and whoever is next finds nothing of one that was killed.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cola_train.cli import main
from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.run_folder import (
    Status,
    locked,
    read_run_config,
    read_status,
    saved_config,
    write_config,
    write_status,
)
from cola_train.run_layout import folder_of
from cola_train.training import preflight
from cola_train.training.branch import branch
from cola_train.training.preflight import open_data, take_over
from cola_train.training.run import export_run, resume, train

VAEConfigs = Callable[..., VAERunConfig]
JointConfigs = Callable[..., JointRunConfig]


def begun(config: RunConfig) -> Path:
    """The folder of a run that has a config and nothing else."""
    folder = folder_of(config)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("way", ["link", ".", "..", "moved", "renamed"])
def test_resuming_goes_on_with_the_folder_that_is_given(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    run = begun(vae_config("vae"))
    given = run
    if way == "link":
        (tmp_path / "elsewhere").mkdir()
        given = tmp_path / "elsewhere" / "link"
        given.symlink_to(run)
    elif way == ".":
        monkeypatch.chdir(run)
        given = Path()
    elif way == "..":
        (run / "logs").mkdir()
        monkeypatch.chdir(run / "logs")
        given = Path("..")
    elif way == "moved":
        (tmp_path / "archive").mkdir()
        given = run = run.rename(tmp_path / "archive" / "vae")
    else:
        given = run = run.rename(tmp_path / "vae-2024")
    config = resume(given, VAERunConfig, ["trainer.max_steps=13"])
    assert folder_of(config).samefile(run)
    assert saved_config(config) is not None


@pytest.mark.parametrize("setting", ["name=other", "runs_folder=other"])
def test_resuming_cannot_name_another_folder(
    vae_config: VAEConfigs, tmp_path: Path, setting: str
) -> None:
    run = begun(vae_config("vae"))
    with pytest.raises(UserError, match=f"{setting} cannot be given with --resume"):
        resume(run, VAERunConfig, [setting])
    resume(run, VAERunConfig, ["name=vae", f"runs_folder={tmp_path}"])


def test_a_run_goes_on_and_is_exported_under_a_new_name_at_a_new_place(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    config = vae_config("vae", "trainer.max_steps=1")
    train(config)
    (tmp_path / "archive").mkdir()
    moved = folder_of(config).rename(tmp_path / "archive" / "vae-2024")
    copied = Path(shutil.copytree(moved, tmp_path / "copy"))
    for run in (moved, copied):
        assert train(resume(run, VAERunConfig, ["trainer.max_steps=2"])) == Status("finished", 2)
        export_run(run, 1, None, 10**9)
        assert json.loads((run / "hf" / "training.json").read_text())["run"] == run.name
    assert not folder_of(config).exists()
    anneal = branch(moved, 2, ["name=anneal", "trainer.max_steps=3"])
    assert folder_of(anneal) == tmp_path / "archive" / "anneal"


def test_a_stage_1_that_moved_is_no_longer_needed_or_is_taken_where_it_lies_now(
    vae_config: VAEConfigs, joint_config: JointConfigs, tmp_path: Path
) -> None:
    vae, joint = vae_config("vae", "trainer.max_steps=1"), f"init_vae_from={tmp_path / 'vae'}"
    train(vae)
    run = joint_config("joint", joint, "trainer.max_steps=1")
    train(run)
    early = begun(joint_config("early", joint, "trainer.max_steps=1"))
    copied = Path(shutil.copytree(folder_of(vae), tmp_path / "copied"))
    moved = folder_of(vae).rename(tmp_path / "moved")
    # It has a checkpoint of its own: nothing of stage 1 is read again.
    assert train(joint_config("joint", joint, "trainer.max_steps=2")) == Status("finished", 2)
    again = resume(
        folder_of(run), JointRunConfig, [f"init_vae_from={moved}", "trainer.max_steps=3"]
    )
    assert train(again) == Status("finished", 3)
    # The same weights are the same stage 1; others are not.
    same = joint_config("joint", f"init_vae_from={copied}", "trainer.max_steps=4")
    assert train(same) == Status("finished", 4)
    (weights,) = (moved / "hf").rglob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"differs in init_vae_from: .*copied', now .*moved'"):
        train(joint_config("joint", f"init_vae_from={moved}"))
    # One that has not needs it, and says by which key.
    with pytest.raises(UserError, match=rf"{joint}: .*vae does not exist"):
        train(resume(early, JointRunConfig))
    found = resume(early, JointRunConfig, [f"init_vae_from={copied}"])
    assert train(found) == Status("finished", 1)


def test_a_warm_start_whose_source_moved_is_not_begun_from_nothing(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    run = begun(vae_config("warm", f"warm_start_from={tmp_path / 'gone'}"))
    with pytest.raises(UserError, match=r"warm_start_from=.*gone is no run with a checkpoint"):
        train(resume(run, VAERunConfig))


def test_what_cannot_change_is_named_with_a_command_that_works(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = folder_of(vae_config("vae"))
    train(vae_config("vae", "trainer.max_steps=1"))
    with pytest.raises(UserError) as caught:
        train(resume(run, VAERunConfig, ["optim.learning_rate=1e-4", "seed=3"]))
    message = str(caught.value)
    assert "it differs in optim.learning_rate: 0.003, now 0.0001; seed: 66, now 3." in message
    assert "without optim.learning_rate and seed, which cannot change in a run" in message
    monkeypatch.chdir(tmp_path)
    for command in re.findall("`cola-train ([^`]*)`", message):
        assert main(shlex.split(command)) == 0
    assert "learning_rate: 0.0001" in (tmp_path / "NEW" / "config.yaml").read_text()
    assert read_status(tmp_path / "NEW") == Status("finished", 1)


def test_a_data_path_that_leads_nowhere_from_here_says_from_where(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun(vae_config("vae", "data.path=rows"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match=f"no prepared data folder rows in {tmp_path}, which data.path is relative to: give",
    ):
        train(resume(run, VAERunConfig))


def crash_at(number: int, act: Callable[[], object]) -> bool:
    """Do something in a process that is gone at its n-th change of the disk; whether it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads: it touches files alone
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = number

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **rest: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os._exit(9)
            return real(*args, **rest)

        return counted

    for name in ("open", "mkdir", "replace", "rename", "fsync", "unlink"):
        setattr(os, name, counting(getattr(os, name)))
    try:
        act()
    finally:
        os._exit(0)


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(".*")} - {".lock"}


def test_a_start_that_was_killed_anywhere_is_begun_again(vae_config: VAEConfigs) -> None:
    config = vae_config("vae", "trainer.precision=fp32")
    data = open_data(config)

    def start() -> None:
        with contextlib.ExitStack() as held:
            take_over(config, data, held)

    for number in range(1, 99):
        shutil.rmtree(folder_of(config), ignore_errors=True)
        (folder_of(config) / "logs" / "20240101-000000-999999999").mkdir(parents=True)
        crashed = crash_at(number, start)
        start()
        assert {path.name for path in folder_of(config).iterdir()} == {
            ".lock",
            "logs",
            "config.yaml",
            "tokenizer.json",
        }
        assert hidden(folder_of(config)) == set()
        if not crashed:
            break
    assert number > 8  # config and tokenizer: each opened, written through and renamed


def test_what_a_killed_process_was_writing_is_gone_at_the_next_start(
    vae_config: VAEConfigs,
) -> None:
    config = vae_config("vae", "trainer.max_steps=1")
    train(config)
    run, end = folder_of(config), ".0123456789abcdef"
    (run / "logs" / "20240101-000000-999999999").mkdir(parents=True)
    for name in ("status.json", "lightning/latest", "logs/20240101-000000-999999999/ranks.json"):
        path = run / name
        path.with_name(f".{path.name}{end}").write_text("half")
    (run / f".hf{end}" / "cola_dlm").mkdir(parents=True)
    (run / f".hf.old{end}").mkdir()
    (run / "hf").rename(run / f".hf.old{end}" / "content")
    (run / ".mine").write_text("precious")
    assert train(config) == Status("finished", 1)
    assert hidden(run) == {".mine"}
    # What was about to be replaced is the only export that there is.
    assert (run / "hf" / "training.json").is_file()


def test_a_config_that_is_not_as_the_run_wrote_it_is_refused(vae_config: VAEConfigs) -> None:
    config = vae_config("vae")
    run = folder_of(config)
    run.mkdir()
    write_config(run, config)
    path = run / "config.yaml"
    whole = path.read_bytes()
    assert read_run_config(run) == config
    body = whole.partition(b"\n")[2].rpartition(b"# xxh3")[0]
    for changed in (
        whole.replace(b"learning_rate: 0.003", b"learning_rate: 0.007"),
        whole.replace(b"seed: 66", b"seed: 67"),
        whole[:-1],
        whole[: len(whole) // 2],
        whole[len(whole) // 2 :],
        whole.replace(b"\n", b"\r\n"),
        b"# xxh3 " + b"0" * 32 + b"\n" + body,
    ):
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(UserError, match="is not as the run wrote it"):
            read_run_config(run)
    # One that was changed on purpose, or comes from an earlier version.
    path.write_bytes(body.replace(b"learning_rate: 0.003", b"learning_rate: 0.007"))
    assert read_run_config(run).optim.learning_rate == 0.007


@pytest.mark.parametrize(
    "text",
    [
        '{"state": "flying", "step": 1}',
        '{"state": "finished", "step": "1"}',
        '{"state": "finished", "step": true}',
        '{"state": ["finished"], "step": 1}',
        '{"state": "finished", "step": 1, "reason": null}',
        "[]",
    ],
)
def test_a_status_of_other_kinds_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_a_lock_that_is_a_pipe_makes_nobody_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(UserError, match="Cannot write"), locked(tmp_path):
        pass


def test_who_comes_second_looks_again_when_the_first_has_gone(
    vae_config: VAEConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = vae_config("vae", "seed=1"), vae_config("vae", "seed=2")

    @contextlib.contextmanager
    def after_the_first(run_folder: Path, *rest: str) -> Iterator[None]:
        (run_folder / "config.yaml").write_text(to_yaml(first), encoding="utf-8")
        with locked(run_folder, *rest):
            yield

    monkeypatch.setattr(preflight, "locked", after_the_first)
    with pytest.raises(UserError, match=r"holds another run.* differs in seed: 1, now 2"):
        train(second)
    assert (folder_of(first) / "config.yaml").read_text() == to_yaml(first)


def test_an_export_into_a_run_waits_for_who_holds_it(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config("vae", "trainer.max_steps=1")
    train(config)
    monkeypatch.setattr("cola_train.run_folder._LOCK_WAIT_SECONDS", 0.1)
    with locked(folder_of(config)):
        with pytest.raises(UserError, match=r"Another process .*, or give --out"):
            export_run(folder_of(config), None, None, 10**9)
        export_run(folder_of(config), None, tmp_path / "out", 10**9)


def test_a_folder_that_cannot_be_written_is_named(
    vae_config: VAEConfigs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/vae: Not a directory"):
        train(vae_config("vae", f"runs_folder={tmp_path / 'file'}"))
    run = begun(vae_config("vae"))

    def read_only(path: str, flags: int) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("cola_train.run_folder.without_waiting", read_only)
    with pytest.raises(UserError, match=rf"Cannot write {run}: Read-only file system"):
        train(vae_config("vae"))


def test_a_run_that_is_gone_without_a_word_has_died(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, Status("running", 3))
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step) == ("died", 3)
    with locked(tmp_path):
        assert read_status(tmp_path) == Status("running", 3)
    write_status(tmp_path, Status("interrupted", 5, "SIGTERM"))
    assert read_status(tmp_path) == Status("interrupted", 5, "SIGTERM")

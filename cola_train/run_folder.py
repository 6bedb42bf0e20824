"""A run's folder: its config, lock and status. It belongs to one run; no other writes into it."""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.families.registry import load_run_config
from cola_train.files import write_atomically
from cola_train.json_text import parse_json
from cola_train.run_layout import CONFIG, LOCK, LOGS, STATUS, folder_of

_LOCK_WAIT_SECONDS = 10.0
RunT = TypeVar("RunT", bound=RunConfig)


def read_run_config(run_folder: Path) -> RunConfig:
    """The resolved config that a run was last trained with.

    Raises:
        UserError: not a run folder, or one of another version, whose config has other keys.
    """
    path = run_folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{run_folder} is not a run folder: it has no {CONFIG}. Runs lie in checkpoints/NAME."
        )
    try:
        return load_run_config(path)
    except UserError as error:
        raise UserError(
            f"{run_folder} cannot be read: {error} If another version of cola-train wrote it, go "
            "on with that version, or start a run from what its `cola-train export` writes: "
            "exports are the same in all."
        ) from error


def saved_config(config: RunT) -> RunT | None:
    """The saved config of the run in this config's folder, which `config` may resume; or None.

    Raises:
        UserError: what lies there is no run, a run of the other stage, or one that differs in more
            than may change.
    """
    run_folder = folder_of(config)
    if not run_folder.exists():
        return None
    if not (run_folder / CONFIG).is_file():
        # A launcher may have put its logs there before the run began.
        if all(path.name in (LOGS, LOCK) for path in run_folder.iterdir()):
            return None
        raise UserError(
            f"{run_folder} exists, is not a run (it has no {CONFIG}) and is not overwritten; "
            "choose another name=..."
        )
    saved = read_run_config(run_folder)
    if type(saved) is not type(config):
        raise UserError(
            f"{run_folder} is a run of `cola-train {saved.stage}`; go on with it by that verb, or "
            "choose another name=..."
        )
    if differences := saved.differences(config):
        raise UserError(
            f"{run_folder} holds another run, which is not overwritten: it differs in "
            f"{'; '.join(differences)}. Choose another name=..., or go on with that run by "
            f"`cola-train {saved.stage} --resume {run_folder}`."
        )
    return saved


def write_config(run_folder: Path, config: RunConfig) -> None:
    """Save the config; one that it replaces is kept as config.before-N.yaml."""
    path, text = run_folder / CONFIG, to_yaml(config)
    if path.is_file():
        before = path.read_text(encoding="utf-8")
        if before == text:
            return
        number = 1
        while (kept := run_folder / f"config.before-{number}.yaml").exists():
            number += 1
        write_atomically(kept, before)
    write_atomically(path, text)


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run stands; what a job script looks at."""

    state: Literal["running", "finished", "interrupted", "stopped", "failed"]
    step: int
    reason: str = ""


def write_status(run_folder: Path, status: Status) -> None:
    """Replace status.json; a disk that refuses it is not worth a run."""
    with contextlib.suppress(UserError):
        write_atomically(run_folder / STATUS, json.dumps(dataclasses.asdict(status)) + "\n")


def read_status(run_folder: Path) -> Status | None:
    """status.json, if it is there and whole."""
    try:
        return Status(**parse_json((run_folder / STATUS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def status_time(run_folder: Path) -> int:
    """When status.json was last written, in nanoseconds; 0 without one."""
    try:
        return (run_folder / STATUS).stat().st_mtime_ns
    except OSError:
        return 0


@contextlib.contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Keep other processes out of a run while the block runs; the lock ends with this process.

    Raises:
        UserError: another process trains this run.
    """
    with (run_folder / LOCK).open("w") as file:
        # What was killed a moment ago may still be ending.
        deadline = time.monotonic() + _LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"Another process is training {run_folder}; two would spoil each other's "
                        "files. Wait for it, stop it, or choose another name=..."
                    ) from None
                time.sleep(0.2)
            except OSError:
                break  # a file system without locks: nothing to hold
        yield

"""A run's folder: its config, lock and status. It belongs to one run; no other writes into it."""

import contextlib
import dataclasses
import fcntl
import filecmp
import json
import shlex
import time
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from cola_train.checksums import is_altered, sealed
from cola_train.config.content import read_bytes, without_waiting
from cola_train.config.load import to_yaml, value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.console import only_warned
from cola_train.families.registry import load_run_config
from cola_train.files import (
    file_hint,
    is_unfinished,
    read_errors_explained,
    write_atomically,
    write_errors_explained,
)
from cola_train.json_text import parse_json
from cola_train.run_layout import CONFIG, EXPORT, LOCK, LOGS, STATUS, folder_of

_LOCK_WAIT_SECONDS = 10.0
# Where a run began from: read before its first checkpoint and never again.
_BEGAN_FROM = ("init_", "warm_start_from", "branched_from")
RunT = TypeVar("RunT", bound=RunConfig)


def read_run_config(run_folder: Path) -> RunConfig:
    """The resolved config that a run was last trained with.

    Raises:
        UserError: not a run folder, or one of another version, whose config has other keys.
    """
    path = run_folder / CONFIG
    if not path.is_file():
        raise UserError(
            f"{run_folder} is not a run folder: it has no {CONFIG}{file_hint(run_folder)}. Runs "
            "lie in checkpoints/NAME."
        )
    with read_errors_explained(path):
        altered = is_altered(read_bytes(path))
    require(
        not altered,
        f"{path} is not as the run wrote it: its checksum does not fit. Put it back (settings that "
        "may change are changed by key=value, with --resume). If you changed it yourself, and mean "
        "that, take out its lines that begin with `# xxh3`.",
    )
    try:
        return load_run_config(path)
    except UserError as error:
        raise UserError(
            f"{run_folder} cannot be read: {error} If another version of cola-train wrote it, go "
            "on with that version, or start a run from what its `cola-train export` writes: "
            "exports are the same in all."
        ) from error


def placed(config: RunT, run_folder: Path) -> RunT:
    """The config of a run that lies in this folder: it may have been moved, renamed or copied."""
    place, runs_folder = run_folder.resolve(), config.runs_folder
    if Path(runs_folder).resolve() != place.parent:
        runs_folder = str(place.parent)
    return dataclasses.replace(config, runs_folder=runs_folder, name=place.name)


def require_data(config: RunConfig) -> None:
    """Refuse a config whose prepared data are not there; asked before what is slow is imported.

    Raises:
        UserError: no such folder.
    """
    path = Path(config.data.path)
    there = "" if path.is_absolute() else f" in {Path.cwd()}, which data.path is relative to"
    require(
        path.is_dir(),
        f"There is no prepared data folder {path}{there}{file_hint(path)}: give data.path=... "
        "where it lies, or write one with `cola-train prepare`.",
    )


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
        require(
            run_folder.is_dir() and all(map(_precedes_config, run_folder.iterdir())),
            f"{run_folder} exists, is not a run (it has no {CONFIG}) and is not overwritten; "
            "choose another name=...",
        )
        return None
    saved = placed(read_run_config(run_folder), run_folder)
    if type(saved) is not type(config):
        raise UserError(
            f"{run_folder} is a run of `cola-train {saved.stage}`; go on with it by that verb, or "
            "choose another name=..."
        )
    # Of the same path it has the same name, whatever it was called when it began.
    named = dataclasses.replace(config, name=saved.name)
    keys = [key for key in saved.differing_keys(named) if not _has_moved(key, saved, named)]
    if keys:
        raise UserError(_another_run(run_folder, saved, named, keys))
    return saved


def _precedes_config(path: Path) -> bool:
    """Whether a start that was killed may have left this: a launcher's logs, the lock, a part."""
    is_part = path.name.startswith(f".{CONFIG}.") and is_unfinished(path)
    return is_part or path.name in (LOGS, LOCK)


def _another_run(run_folder: Path, saved: RunT, config: RunT, keys: Sequence[str]) -> str:
    changes = [f"{key}: {value_at(saved, key)!r}, now {value_at(config, key)!r}" for key in keys]
    given = [
        f"{key}={_as_setting(value_at(config, key))}"
        for key in keys
        if key not in ("warm_start_from", "branched_from")  # not set by hand
    ]
    return (
        f"{run_folder} holds another run, which is not overwritten: it differs in "
        f"{'; '.join(changes)}. Choose another name=..., or go on with that run without "
        f"{' and '.join(keys)}, which cannot change in a run: `cola-train {saved.stage} --resume "
        f"{run_folder}`. A new run that begins with its weights: `cola-train warm-start "
        f"{run_folder} {run_folder / CONFIG} {shlex.join(['name=NEW', *given])}`."
    )


def _as_setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _has_moved(key: str, saved: RunConfig, config: RunConfig) -> bool:
    """Whether a key names the same folder of a run or checkpoint, at another place."""
    old, new = value_at(saved, key), value_at(config, key)
    if not key.startswith(_BEGAN_FROM) or old is None or new is None:
        return False
    old, new = Path(old), Path(new)
    if key == "branched_from":  # RUN/step-N
        if old.name != new.name:
            return False
        old, new = old.parent, new.parent
    if not new.is_dir():
        return False
    return not old.is_dir() or old.samefile(new) or _same_weights(old, new)


def _same_weights(old: Path, new: Path) -> bool:
    ours, theirs = _weights(old), _weights(new)
    return (
        bool(ours)
        and ours.keys() == theirs.keys()
        and all(filecmp.cmp(path, theirs[name], shallow=False) for name, path in ours.items())
    )


def _weights(folder: Path) -> dict[Path, Path]:
    """The weight files of an export, or of a run's export, by their places in it."""
    root = folder / EXPORT if (folder / EXPORT).is_dir() else folder
    return {path.relative_to(root): path for path in root.rglob("*.safetensors")}


def write_config(run_folder: Path, config: RunConfig) -> None:
    """Save the config; one that it replaces is kept as config.before-N.yaml."""
    path, text = run_folder / CONFIG, sealed(to_yaml(config))
    if path.is_file():
        with read_errors_explained(path):
            before = read_bytes(path)
        if before == text.encode():
            return
        number = 1
        while (kept := run_folder / f"config.before-{number}.yaml").exists():
            number += 1
        write_atomically(kept, before)
    write_atomically(path, text)


_State = Literal["running", "finished", "interrupted", "stopped", "failed", "died"]


@dataclasses.dataclass(frozen=True)
class Status:
    """How a run stands; what a job script looks at.

    "died" stands in no file: a reader finds it where "running" does and no process holds the run.
    """

    state: _State
    step: int
    reason: str = ""


def write_status(run_folder: Path, status: Status) -> None:
    """Replace status.json; a disk that refuses it is not worth a run, but is told."""
    with only_warned(f"it could not be written how {run_folder} stands ({status.state})"):
        write_atomically(run_folder / STATUS, json.dumps(dataclasses.asdict(status)) + "\n")


def read_status(run_folder: Path) -> Status | None:
    """How a run truly stands; None where status.json is absent or damaged."""
    status = _written_status(run_folder)
    if status is None or status.state != "running" or is_locked(run_folder):
        return status
    # It may have ended between the two looks.
    status = _written_status(run_folder)
    if status is None or status.state != "running":
        return status
    reason = "Its process is gone without a word (killed, out of memory, power)."
    return dataclasses.replace(status, state="died", reason=reason)


def write_unsaid_end(run_folder: Path, status: Status) -> None:
    """Put a status in place of the "running" that a process could not take back."""
    # Unless another has begun with the run meanwhile.
    with contextlib.suppress(UserError), locked(run_folder):
        written = _written_status(run_folder)
        if written is not None and written.state == "running":
            write_status(run_folder, status)


def _written_status(run_folder: Path) -> Status | None:
    try:
        status = Status(**parse_json(read_bytes(run_folder / STATUS).decode()))
    except (OSError, ValueError, TypeError):
        return None
    is_one = status.state in typing.get_args(_State) and type(status.step) is int
    return status if is_one and isinstance(status.reason, str) else None


def status_time(run_folder: Path) -> int:
    """When status.json was last written, in nanoseconds; 0 without one."""
    try:
        return (run_folder / STATUS).stat().st_mtime_ns
    except OSError:
        return 0


@contextlib.contextmanager
def locked(run_folder: Path, otherwise: str = "choose another name=...") -> Iterator[None]:
    """Keep other processes out of a run while the block runs; the lock ends with this process.

    `otherwise` ends the message that says what to do.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    with write_errors_explained(run_folder):
        file = open(run_folder / LOCK, "w", opener=without_waiting)  # noqa: SIM115
    try:
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
                        f"files. Wait for it, stop it, or {otherwise}"
                    ) from None
                time.sleep(0.2)
            except OSError:
                break  # a file system without locks: nothing to hold
        yield
    finally:
        with contextlib.suppress(OSError):  # nothing was written to it
            file.close()


def is_locked(run_folder: Path) -> bool:
    """Whether some process, this one or another, holds a run; True where locks are not known."""
    try:
        with open(run_folder / LOCK, opener=without_waiting) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False

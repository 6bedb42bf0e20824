"""Which runs a folder holds, and how each stands: from a few of its files, without torch."""

import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.content import open_file
from cola_train.config.load import read_values
from cola_train.config.settings import UserError, require
from cola_train.console import aligned
from cola_train.files import file_hint, read_errors_explained
from cola_train.json_text import parse_json
from cola_train.run_folder import is_locked, read_status
from cola_train.run_layout import CONFIG, METRICS, STATUS, STEP_LOG

_TAIL_BYTES = 1 << 16
_NONE = "-"


@dataclasses.dataclass(frozen=True)
class RunRow:
    """A line of the table.

    Attributes:
        name: of its folder.
        verb: what trains it; None where its config cannot be read.
        state: as of `Status`, or "not begun".
        step: optimizer steps done.
        loss: of training, last logged; None before, or where it was not finite.
        eflops: spent in all, by the run's budget.convention; None before anything was logged.
        changed: when one of its logs was last written, in local time, ISO 8601.
        reason: why it stands so, where it says.
    """

    name: str
    verb: str | None
    state: str
    step: int
    loss: float | None
    eflops: float | None
    changed: str
    reason: str


def list_runs(folder: Path) -> list[RunRow]:
    """The runs that lie in a folder, by name, or the one whose folder it is.

    Raises:
        UserError: no such folder, or one that may not be read.
    """
    require(
        folder.is_dir(),
        f"There is no folder {folder}{file_hint(folder)}. Give the one that holds your runs "
        "(runs_folder): cola-train runs FOLDER.",
    )
    with read_errors_explained(folder):
        inside = [folder] if (folder / CONFIG).is_file() else sorted(folder.iterdir())
        return [_row(path) for path in inside if (path / CONFIG).is_file()]


def table(rows: list[RunRow]) -> str:
    """The runs in columns, with a heading."""
    heading = ["name", "verb", "state", "step", "loss", "EFLOPs", "last change"]
    cells = [
        [
            row.name,
            row.verb or "unreadable",
            row.state,
            f"{row.step:,}",
            _NONE if row.loss is None else f"{row.loss:.4f}",
            _NONE if row.eflops is None else f"{row.eflops:.4g}",
            row.changed[:19].replace("T", " "),
        ]
        for row in rows
    ]
    return "\n".join(aligned([heading, *cells]))


def _row(folder: Path) -> RunRow:
    try:
        config = read_values(folder / CONFIG)
    except UserError:
        config = {}
    status = read_status(folder)
    last: dict[str, Any] = {}  # of each figure the newest
    for line in _newest_lines(folder / METRICS):
        last = {**line, **last}
    if status is None:
        state, step, reason = "running" if is_locked(folder) else "not begun", 0, ""
    else:
        state, step, reason = status.state, status.step, status.reason
    if state in ("running", "died"):
        # Its status has the step that it began with.
        step = max(step, int(_number(last.get("step")) or 0), _last_step(folder))
    budget = config.get("budget")
    convention = budget.get("convention") if isinstance(budget, Mapping) else None
    verb = config.get("stage")
    return RunRow(
        name=folder.resolve().name,
        verb=str(verb) if isinstance(verb, str) else None,
        state=state,
        step=step,
        loss=_number(last.get("train/loss")),
        eflops=_number(last.get(f"eflops_{convention}")),
        changed=_changed(folder),
        reason=reason,
    )


def _number(value: object) -> float | None:
    """A figure of a log, where it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < 2.0**63 else None


def _last_step(folder: Path) -> int:
    """The last step that was done since the run was last started; 0 for none."""
    for line in _newest_lines(folder / STEP_LOG):
        if "step" in line:
            return int(_number(line["step"]) or 0)
        if "attempt" in line:
            break
    return 0


def _newest_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The last lines of a log, the newest first; those that a crash cut short are passed over."""
    if not path.is_file():
        return
    with open_file(path) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        tail = file.read()
    for line in reversed(tail.split(b"\n")):
        try:
            row = parse_json(line.decode(errors="replace"))
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _changed(folder: Path) -> str:
    times = [
        path.stat().st_mtime
        for path in (folder / name for name in (CONFIG, STATUS, METRICS, STEP_LOG))
        if path.is_file()
    ]
    return datetime.datetime.fromtimestamp(max(times)).astimezone().isoformat(timespec="seconds")

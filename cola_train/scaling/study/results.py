"""results.jsonl: what is known of each trial and seed, a line each, whatever becomes of the run."""

import dataclasses
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_train.config.settings import require
from cola_train.files import write_atomically
from cola_train.json_lines import json_lines, read_jsonl
from cola_train.scaling.study.trials import TrialRun

RESULTS = "results.jsonl"


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of one run of a trial."""

    trial: str
    seed: int
    made_of: Mapping[str, Any]  # TrialRun.made_of
    # Of "metrics", the last step's of metrics.jsonl, and of each part that was measured; by their
    # names where they come from.
    figures: Mapping[str, Mapping[str, float]]
    cost: Mapping[
        str, float
    ]  # of its own training: tokens, seconds, cpu_seconds, eflops_CONVENTION
    measured: Mapping[str, Any]  # by part ("inspection" or comparison/NAME), its settings
    conditions: Mapping[str, Any]  # by comparison, of its figures (conditions.py)
    failure: str | None  # why its training ended early; there are no figures then


_FIELDS = {field.name: field for field in dataclasses.fields(Result)}


class Results:
    """The lines of a study's results.jsonl, by what was run; of equal ones the last counts.

    Lines of other settings than the spec's stay. Several threads of one process may put lines.
    """

    def __init__(self, path: Path) -> None:
        """Read them; none without a file.

        Raises:
            UserError: a line that is no result, by its number.
        """
        self.path = path
        self._lock = threading.Lock()
        self._rows: dict[str, Result] = {}
        if path.is_file():
            for where, row in read_jsonl(path, "results"):
                result = _result(row, where)
                self._rows[_key(result)] = result

    def of(self, run: TrialRun) -> Result | None:
        """What is known of a run; None if nothing is."""
        return self._rows.get(_key(run))

    def changes(self, run: TrialRun) -> list[str]:
        """What differs between a run and the last line of its trial and seed; empty without one."""
        same = [
            row for row in self._rows.values() if (row.trial, row.seed) == (run.trial, run.seed)
        ]
        return _changes(same[-1].made_of, run.made_of) if same else []

    def trials(self) -> list[str]:
        """The names of trials that have lines."""
        return [*dict.fromkeys(row.trial for row in self._rows.values())]

    def put(self, result: Result) -> None:
        """Replace the line of a run, or add one; the file is whole at any time."""
        with self._lock:
            self._rows[_key(result)] = result
            rows = [dataclasses.asdict(row) for row in self._rows.values()]
            write_atomically(self.path, json_lines(rows))


def _key(of: Result | TrialRun) -> str:
    return json.dumps([of.trial, of.made_of], sort_keys=True)


def _result(row: Any, where: str) -> Result:
    next_step = "Take the line out, or put back what `cola-train study run` wrote."
    require(
        isinstance(row, dict) and row.keys() == _FIELDS.keys(),
        f"{where} is no result of a study: it must have {', '.join(_FIELDS)}. {next_step}",
    )
    types = {"trial": str, "seed": int, "failure": str | None}
    for name in _FIELDS:
        require(
            isinstance(row[name], types.get(name, dict)),
            f"{where}: {name} is {row[name]!r}, which it cannot be. {next_step}",
        )
    for name, values in {"cost": row["cost"], **row["figures"]}.items():
        require(
            isinstance(values, dict),
            f"{where}: figures.{name} is {values!r}, which it cannot be. {next_step}",
        )
        for key, value in values.items():
            require(
                isinstance(value, int | float) and not isinstance(value, bool),
                f"{where}: {key} of {name} must be a number, not {value!r}. {next_step}",
            )
    return Result(**row)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = _flat(before), _flat(now)
    return [
        f"{key}: {old.get(key, 'the default')}, now {new.get(key, 'the default')}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: made_of.get(name) for name in ("family", "seed")}
    found |= made_of.get("settings", {})
    for name, inner in made_of.get("starts", {}).items():
        found |= {f"{{{name}}}.{key}": value for key, value in _flat(inner).items()}
    return found

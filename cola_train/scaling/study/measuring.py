"""What is measured of a trained run by `cola-train inspect` and `compare`, and what it cost."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_train.config.content import read_bytes
from cola_train.config.load import changed_values
from cola_train.config.settings import Settings
from cola_train.console import say
from cola_train.evaluation.writing.conditions import CONDITIONS
from cola_train.families.registry import family_of
from cola_train.json_lines import read_log
from cola_train.json_text import parse_json
from cola_train.run_layout import CLOCKS, INSPECTION, METRICS, SUMMARY
from cola_train.scaling.children import overrides, succeeds
from cola_train.scaling.study.config import COMPARISON, StudyConfig
from cola_train.scaling.study.results import Result, Results
from cola_train.scaling.study.trials import TrialRun

_COST = ("tokens", "seconds", "cpu_seconds")
_EFLOPS = "eflops_"


def parts(spec: StudyConfig, run: TrialRun) -> dict[str, dict[str, Any]]:
    """What is to be measured of a run, by the names in Result.measured, with its settings."""
    family = family_of(run.config)
    found: dict[str, dict[str, Any]] = {}
    if family.has_latents:
        data = spec.inspection_data or run.config.data.path
        found[INSPECTION] = {**_settings(spec.inspection), "data": data}
    if family.writes_text:
        chosen = spec.trials[run.trial].comparisons
        for name in spec.comparisons if chosen is None else chosen:
            found[COMPARISON + name] = _settings(spec.comparisons[name])
    return found


def figures_of(result: Result, missing: Sequence[str]) -> dict[str, float]:
    """A result's figures but those of `missing` parts; a comparison's begin with its name."""
    return {
        f"{part}/{name}" if part.startswith(COMPARISON) else name: value
        for part, figures in result.figures.items()
        for name, value in figures.items()
        if part not in missing
    }


def missing_parts(spec: StudyConfig, run: TrialRun, result: Result | None) -> list[str]:
    """The parts that are not measured, or not with these settings."""
    known = {} if result is None else result.measured
    return [name for name, settings in parts(spec, run).items() if known.get(name) != settings]


def is_measured(spec: StudyConfig, run: TrialRun, result: Result | None) -> bool:
    """Whether all is known that the spec asks of a run."""
    is_trained = result is not None and result.failure is None
    return is_trained and not missing_parts(spec, run, result)


def measure(spec: StudyConfig, results: Results, run: TrialRun) -> bool:
    """Measure of a trained run what is missing in `results`, which get each part as it comes.

    Returns whether all of it succeeded.
    """
    folder = Path(spec.folder) / run.name
    known = results.of(run)
    if known is None or known.failure is not None:
        figures = {"metrics": metrics_of(folder)}
        known = Result(run.trial, run.seed, run.made_of, figures, cost_of(folder), {}, {}, None)
        results.put(known)
    for name in missing_parts(spec, run, known):
        settings, conditions = parts(spec, run)[name], dict(known.conditions)
        if name == INSPECTION:
            found = _inspect(run, folder, settings)
        else:
            found, conditions[name] = _compare(run, folder, name, settings)
        if found is None:
            return False
        known = dataclasses.replace(
            known,
            figures={**known.figures, name: found},
            measured={**known.measured, name: settings},
            conditions=conditions,
        )
        results.put(known)
    return True


def metrics_of(run: Path) -> dict[str, float]:
    """The last step's figures in metrics.jsonl, but those of `compare`, clocks and costs."""
    rows = [*read_log(run / METRICS)]
    last = max((row["step"] for row in rows if "tokens" in row), default=None)
    found: dict[str, float] = {}
    for row in rows:
        if row["step"] == last and CONDITIONS not in row:
            found |= _numbers(row)
    left_out = {*CLOCKS, "step", "tokens"}
    return {
        name: value
        for name, value in found.items()
        if name not in left_out and not name.startswith(_EFLOPS)
    }


def cost_of(run: Path) -> dict[str, float]:
    """What a run's training has cost, by the names of Result.cost, as far as that is known."""
    # A disk may have refused it.
    summary = _read(run / SUMMARY) if (run / SUMMARY).is_file() else {}
    found = {name: summary[name] for name in _COST if name in summary}
    found |= {_EFLOPS + name: value for name, value in summary.get("eflops", {}).items()}
    return _numbers(found)


def _inspect(run: TrialRun, folder: Path, settings: Mapping[str, Any]) -> dict[str, float] | None:
    say(f"{run.name}: inspecting")
    # A look that is there already may be with other settings, or from before the run went on.
    names = itertools.chain([INSPECTION], (f"{INSPECTION}-{n}" for n in itertools.count(2)))
    out = next(folder / name for name in names if not (folder / name).exists())
    given = {name: value for name, value in settings.items() if name != "data"}
    arguments = ["inspect", str(folder), "--data", settings["data"], "--out", str(out)]
    if not succeeds([*arguments, *overrides(given)], folder):
        return None
    return _numbers(_read(out / "inspection.json")["figures"])


def _compare(
    run: TrialRun, folder: Path, name: str, settings: Mapping[str, Any]
) -> tuple[dict[str, float] | None, dict[str, Any]]:
    """Figures, and their conditions."""
    say(f"{run.name}: comparing, {name.removeprefix(COMPARISON)}")
    if not succeeds(["compare", str(folder), *overrides(settings)], folder):
        return None, {}
    row = [row for row in read_log(folder / METRICS) if CONDITIONS in row][-1]
    figures = {
        figure.removeprefix(COMPARISON): value
        for figure, value in _numbers(row).items()
        if figure.startswith(COMPARISON)
    }
    return figures, row[CONDITIONS]


def _settings(config: Settings) -> dict[str, Any]:
    """What is not the default, as JSON gives it back."""
    return dict(parse_json(json.dumps(changed_values(config))))


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in row.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _read(path: Path) -> dict[str, Any]:
    return dict(parse_json(read_bytes(path).decode()))

"""A study's table: a line a trial, with figures, differences to the first trial, and cost."""

import dataclasses
import difflib
import textwrap
from collections.abc import Sequence
from pathlib import Path

from cola_train.evaluation.writing.conditions import differences
from cola_train.run_folder import read_status
from cola_train.scaling.study.config import COMPARISON, StudyConfig
from cola_train.scaling.study.measuring import figures_of, missing_parts
from cola_train.scaling.study.results import Result, Results
from cola_train.scaling.study.seeds import SeedMean, less, over_seeds
from cola_train.scaling.study.trials import TrialRun

_LONGEST = 200  # characters of why a run failed; results.jsonl has all
COSTS = ("cpu_seconds", "seconds", "tokens", "eflops_model")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One figure of one trial."""

    value: SeedMean
    difference: SeedMean | None  # less the first trial's, by seeds that both have
    is_apart: bool = False  # judged otherwise than the first trial, so there is no difference


@dataclasses.dataclass(frozen=True)
class Row:
    """One trial."""

    trial: str
    why: str
    overrides: list[str]
    num_runs: int
    unfinished: list[str]  # runs that are not measured, and why
    cells: list[Cell | None]  # by Table.columns
    costs: list[SeedMean | None]  # by COSTS


@dataclasses.dataclass(frozen=True)
class Table:
    """A study's figures, trials in the spec's order."""

    columns: list[str]
    rows: list[Row]
    notes: list[str]  # sentences


@dataclasses.dataclass(frozen=True)
class _Known:
    """One run that has a result."""

    run: TrialRun
    result: Result
    figures: dict[str, float]  # those that were made as the spec says


def make_table(spec: StudyConfig, runs: Sequence[TrialRun], results: Results) -> Table:
    """Sum up what is known of each trial of the spec."""
    found = [
        _Known(run, result, figures_of(result, missing_parts(spec, run, result)))
        for run in runs
        if (result := results.of(run)) is not None
    ]
    columns, notes = _columns(spec, {figure for one in found for figure in one.figures})
    by_trial = {name: [one for one in found if one.run.trial == name] for name in spec.trials}
    first, *_ = by_trial.values()
    rows = []
    for name, trial in spec.trials.items():
        own, its_runs = by_trial[name], [run for run in runs if run.trial == name]
        apart = {column: _apart(column, own, first) for column in columns}
        judged = {column.rpartition("/")[0]: text for column, text in apart.items() if text}
        notes += [f"(*) {name} is judged otherwise, {by}: {how}." for by, how in judged.items()]
        rows.append(
            Row(
                trial=name,
                why=trial.why,
                overrides=[*([trial.config] if trial.config else []), *trial.settings],
                num_runs=len(its_runs),
                unfinished=[text for run in its_runs if (text := _lack(spec, run, results))],
                cells=[_cell(column, own, first, bool(apart[column])) for column in columns],
                costs=[
                    over_seeds([one.result.cost[cost] for one in own if cost in one.result.cost])
                    for cost in COSTS
                ],
            )
        )
    if unknown := [name for name in results.trials() if name not in spec.trials]:
        notes.append(f"There are results of trials that the spec lacks: {', '.join(unknown)}.")
    return Table(columns, rows, notes)


def _columns(spec: StudyConfig, figures: set[str]) -> tuple[list[str], list[str]]:
    """The names of the figures to show, and notes on those that no result has."""
    columns, absent = [], []
    for name in spec.columns:
        figure = name.removeprefix(COMPARISON)
        is_of_each = name != figure and "/" not in figure
        wanted = [f"{COMPARISON}{by}/{figure}" for by in spec.comparisons] if is_of_each else [name]
        shown = [each for each in wanted if each in figures]
        columns += shown
        if not shown and figures:
            close = difflib.get_close_matches(name, figures, n=1, cutoff=0.8)
            absent.append(f"{name} (did you mean {close[0]!r}?)" if close else name)
    return columns, [f"No result has {', '.join(absent)}."] if absent else []


def _cell(
    column: str, own: Sequence[_Known], first: Sequence[_Known], is_apart: bool
) -> Cell | None:
    ours, theirs = (
        {one.run.seed: one.figures[column] for one in some if column in one.figures}
        for some in (own, first)
    )
    value = over_seeds([*ours.values()])
    if value is None:
        return None
    return Cell(value, None if is_apart or own is first else less(ours, theirs), is_apart)


def _apart(column: str, own: Sequence[_Known], first: Sequence[_Known]) -> str:
    """How a figure of `compare` was found otherwise than the first trial's; empty if it was not."""
    name = column.rpartition("/")[0]
    ours, theirs = (
        [one.result.conditions[name] for one in some if name in one.result.conditions]
        for some in (own, first)
    )
    found = [text for one in ours for other in theirs[:1] for text in differences(one, other)]
    return "; ".join(dict.fromkeys(found))


def _lack(spec: StudyConfig, run: TrialRun, results: Results) -> str:
    """What a run lacks to be measured; empty if nothing."""
    known = results.of(run)
    if known is not None and known.failure is not None:
        return textwrap.shorten(f"{run.name} failed {known.failure}", _LONGEST, placeholder=" ...")
    missing = missing_parts(spec, run, known)
    if known is not None:
        return f"{run.name} lacks {', '.join(missing)}" if missing else ""
    status = read_status(Path(spec.folder) / run.name)
    stands = "not trained"
    if status is not None:
        stands = f"{status.state} at step {status.step}, not measured"
    changes = results.changes(run)
    before = f" (there is a result of other settings: {'; '.join(changes)})" if changes else ""
    return f"{run.name} is {stands}{before}"

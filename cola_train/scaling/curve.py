"""`cola-train curve run`: train and measure every point of a ladder that is not finished."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_train.config.load import changed_values
from cola_train.console import say
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.conditions import CONDITIONS, refuse_apart
from cola_train.families.registry import family_of
from cola_train.files import write_atomically
from cola_train.json_lines import read_log
from cola_train.run_folder import read_run_config
from cola_train.run_layout import METRICS
from cola_train.scaling.children import (
    exit_status,
    finish,
    is_finished,
    levels,
    overrides,
    succeeds,
)
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.ladder import PlannedRun, ladder, stage1_flops
from cola_train.scaling.points import POINTS, Point, write_points

_COMPARISON = "comparison/"


def run_curve(spec: CurveConfig, spec_folder: Path, *, retry: bool, parallel: int) -> int:
    """Run a ladder here, `parallel` runs at a time, and write its points.csv.

    The same call resumes: finished runs are skipped, interrupted ones continue, failed ones are
    reported and, with `retry`, run again from their last checkpoint. Returns the exit status: 1 if
    a run failed.

    Raises:
        UserError: an error in the spec or in a run's config, before anything is trained.
    """
    planned_runs = ladder(spec, spec_folder)
    PreparedData.open(planned_runs[0].config.data.path)
    path = Path(spec.folder) / POINTS
    measure = functools.partial(_compare, spec)
    folder = Path(spec.folder)
    for outcomes in finish(folder, planned_runs, measure, retry=retry, parallel=parallel):
        points = measured(spec, planned_runs)
        write_points(path, points)
        failed = [name for name, outcome in outcomes.items() if outcome != "finished"]
    num_points = sum(planned.is_point for planned in planned_runs)
    say(f"{len(points)} of {num_points} points are measured: {path}")
    return exit_status(folder, failed)


def write_launch_lines(
    spec: CurveConfig, spec_folder: Path, folder: Path, launcher: str
) -> list[Path]:
    """Write a shell line for each run; level-N.sh needs level N - 1, and its lines have no order.

    A SLURM array runs line SLURM_ARRAY_TASK_ID of a file. `launcher` is what starts a training:
    "cola-train" or, for example, "bash scripts/launch_torchrun.sh".
    """
    paths = []
    for number, level in enumerate(levels(ladder(spec, spec_folder))):
        lines = []
        for planned in level:
            line = f"{launcher} {shlex.join(planned.arguments)}"
            if planned.is_point:
                line += f" && {shlex.join(['cola-train', *_comparison_arguments(spec, planned)])}"
            lines.append(line)
        path = folder / f"level-{number}.sh"
        write_atomically(path, "\n".join(lines) + "\n")
        paths.append(path)
    return paths


def _compare(spec: CurveConfig, planned: PlannedRun) -> bool:
    """Measure a trained run, as far as that is not done."""
    run = Path(spec.folder) / planned.name
    if not planned.is_point or comparison_of(run) is not None:
        return True
    say(f"{planned.name}: comparing")
    return succeeds(_comparison_arguments(spec, planned), run)


def _comparison_arguments(spec: CurveConfig, planned: PlannedRun) -> list[str]:
    settings = changed_values(spec.comparison)
    return ["compare", f"{spec.folder}/{planned.name}", *overrides(settings)]


def comparison_of(run: Path) -> dict[str, Any] | None:
    """The newest line that `cola-train compare` wrote of a run's last step; None without one."""
    rows = [*read_log(run / METRICS)]
    last = max((row["step"] for row in rows if "tokens" in row), default=None)
    of_last = [row for row in reversed(rows) if row["step"] == last]
    return next((row for row in of_last if any(map(_is_compared, row))), None)


def _is_compared(name: str) -> bool:
    return name.startswith(_COMPARISON)


def measured(spec: CurveConfig, planned_runs: Sequence[PlannedRun]) -> list[Point]:
    """The points that have been trained and compared, from their metrics.jsonl.

    Raises:
        UserError: they were not compared in the same way.
    """
    stage1 = {run.family: stage1_flops(run) for run in planned_runs if run.kind == "stage1"}
    points, conditions = [], []
    for planned in planned_runs:
        run = Path(spec.folder) / planned.name
        row = comparison_of(run) if planned.is_point and is_finished(run) else None
        if row is None:
            continue
        conditions.append((str(run), row.get(CONDITIONS)))
        spent = [row for row in read_log(run / METRICS) if "tokens" in row][-1]
        before = stage1.get(planned.family, {})
        flops = {
            name: round(spent[f"eflops_{name}"] * 1e18) + before.get(name, 0)
            for name in ("paper", "model", "executed")
        }
        points.append(
            Point(
                family=planned.family,
                size=planned.size,
                parameters=family_of(planned.config).backbone_parameters(read_run_config(run)),
                tokens=int(spent["tokens"]),
                budget=planned.budget,
                flops=flops,
                kind=planned.kind,
                metrics={
                    name.removeprefix(_COMPARISON): row[name] for name in row if _is_compared(name)
                },
            )
        )
    refuse_apart(
        conditions,
        "Give `cola-train compare RUN` again with the settings of the others; its newest figures "
        "count.",
    )
    return points

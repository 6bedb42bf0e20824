"""`cola-train bench growth`: how a training step's time and memory grow with each of its sizes."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cola_train.bench.config import BenchGrowthConfig, BenchTrainConfig, refuse_existing
from cola_train.bench.worker import measure_in_a_process
from cola_train.bench.workloads import run_config
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.families.registry import family_of

_NAMES = {
    "batch": "rows of a step",
    "length": "tokens of a row",
    "block_size": "latents of a block",
    "layers": "layers of the DiT",
    "width": "width of the DiT",
}
_PANEL = (2.1, 2.0)  # inches


class _GrowthStep(NamedTuple):
    """A training step to measure, and the size by which it differs from others of its series."""

    value: int
    config: BenchTrainConfig
    of_run: tuple[str, ...] = ()


def run_growth(config: BenchGrowthConfig, of_run: Sequence[str]) -> dict[str, Any]:
    """Measure the workload's step with one size varied at a time, each step in its own process.

    Returns:
        `series`: by what varies ("batch", "length", "block_size", "layers", "width") its steps,
        each with `value`, `seconds` (median), `tokens_per_second`, `tokens_per_second_per_gflops`,
        `growth_bytes`, `parameters` of the backbone and `flops` (executed); `exponents`: by series
        the slope of log time over log size; `time_ratio`: time at the largest batch over that
        at the smallest; and the `machine` of the first step. config.figure asks for a plot of it.

    Raises:
        UserError: whatever the settings are refused for; a workload whose backbone cannot be
            varied, or a width that is no multiple of its head width; a figure that exists.
    """
    images = [] if config.figure is None else [Path(f"{config.figure}.{s}") for s in ("png", "svg")]
    refuse_existing(*images)
    measured: dict[tuple[BenchTrainConfig, tuple[str, ...]], dict[str, Any]] = {}
    series: dict[str, list[dict[str, Any]]] = {}
    for name, steps in _growth_steps(config, of_run).items():
        series[name] = []
        for value, train, own in steps:
            # Series meet in the workload's own step, which is measured once.
            if (train, own) not in measured:
                say(" ".join([f"{name} {value}: {train.rows} x {train.seq_len}", *own]))
                measured[train, own] = measure_in_a_process("train", train, [*of_run, *own])
            series[name].append({"value": value, **_summary(measured[train, own])})
    batches = series["batch"]
    result = {
        "workload": config.workload,
        "machine": next(iter(measured.values()))["machine"],
        "series": series,
        "exponents": {name: _exponent(steps) for name, steps in series.items()},
        "time_ratio": batches[-1]["seconds"] / batches[0]["seconds"],
    }
    if images:
        _draw(series, *images)
    return result


def _growth_steps(config: BenchGrowthConfig, of_run: Sequence[str]) -> dict[str, list[_GrowthStep]]:
    """The steps of each series."""
    base = BenchTrainConfig(
        threads=config.threads,
        warmups=config.warmups,
        runs=config.runs,
        workload=config.workload,
        rows=config.rows,
        seq_len=config.seq_len,
    )
    run = run_config(base, of_run)
    family = family_of(run)

    def steps(size: str, values: Sequence[int]) -> list[_GrowthStep]:
        found = []
        for value in values:
            settings = family.growth_settings(run, size, value)
            if settings is None:
                raise UserError(
                    "bench growth varies the sizes of a backbone: give a workload of stage 2, not "
                    f"{config.workload}."
                )
            found.append(_GrowthStep(value, base, settings))
        return found

    replace = dataclasses.replace
    return {
        "batch": [_GrowthStep(rows, replace(base, rows=rows)) for rows in config.batches],
        "length": [_GrowthStep(tokens, replace(base, seq_len=tokens)) for tokens in config.lengths],
        "block_size": steps("block_size", config.block_sizes),
        "layers": steps("layers", config.layers),
        "width": steps("width", config.widths),
    }


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "seconds": result["seconds"]["median"],
        "tokens_per_second": result["tokens_per_second"],
        "tokens_per_second_per_gflops": result["tokens_per_second_per_gflops"],
        "growth_bytes": result["memory"]["growth_bytes"],
        "parameters": result["backbone_parameters"],
        "flops": result["flops"]["executed"],
    }


def _exponent(steps: Sequence[dict[str, Any]]) -> float | None:
    """The least-squares slope of log time over log size."""
    if len(steps) < 2:
        return None
    return statistics.linear_regression(
        [math.log(step["value"]) for step in steps], [math.log(step["seconds"]) for step in steps]
    ).slope


def _draw(series: Mapping[str, Sequence[Mapping[str, Any]]], png: Path, svg: Path) -> None:
    """A column for each size that varies. Dotted: growth in proportion from the first step on."""
    # Only those who ask for a figure wait for matplotlib.
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

    from cola_train.drawing import BLUE, GREEN, drawing

    # From above: a measure with its unit, its key in a step's results, its divisor, its color.
    measures = (
        ("seconds a step", "seconds", 1.0, BLUE),
        ("memory growth (MB)", "growth_bytes", 1e6, GREEN),
    )
    rows, columns = len(measures), len(series)
    with drawing((_PANEL[0] * columns, _PANEL[1] * rows), png, svg) as figure:
        grid = figure.subplots(rows, columns, sharey="row", sharex="col", squeeze=False)
        for column, (name, steps) in enumerate(series.items()):
            sizes = [step["value"] for step in steps]
            for row, (label, key, divisor, color) in enumerate(measures):
                axes = grid[row][column]
                values = [step[key] / divisor for step in steps]
                if name != "block_size":  # which is no amount of work
                    proportional = [values[0] * size / sizes[0] for size in sizes]
                    axes.plot(sizes, proportional, ":", color="0.5", linewidth=1)
                axes.plot(sizes, values, "o-", color=color)
                axes.set(xscale="log", yscale="log")
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_locator(FixedLocator(sizes))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(ScalarFormatter())
                if column == 0:
                    axes.set_ylabel(label)
                if row == rows - 1:
                    axes.set_xlabel(_NAMES[name])

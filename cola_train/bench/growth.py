"""`cola-train bench growth`: how a training step's time and memory grow with each of its sizes."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_train.bench.config import BenchGrowthConfig, BenchTrainConfig
from cola_train.bench.results import refuse_existing
from cola_train.bench.worker import measure_in_a_process
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.families.registry import family_of


@dataclasses.dataclass(frozen=True)
class GrowthStep:
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
        UserError: whatever the settings are refused for, the workload's widths among it; a figure
            that exists.
    """
    images = [] if config.figure is None else [Path(f"{config.figure}.{s}") for s in ("png", "svg")]
    refuse_existing(*images)
    measured: dict[tuple[BenchTrainConfig, tuple[str, ...]], dict[str, Any]] = {}
    series: dict[str, list[dict[str, Any]]] = {}
    for name, steps in growth_steps(config, of_run).items():
        series[name] = []
        for step in steps:
            # Series meet in the workload's own step, which is measured once.
            train, own = step.config, step.of_run
            if (train, own) not in measured:
                say(" ".join([f"{name} {step.value}: {train.rows} x {train.seq_len}", *own]))
                measured[train, own] = measure_in_a_process("train", train, [*of_run, *own])
            series[name].append(_summary(step, measured[train, own]))
    batches = series["batch"]
    result = {
        "workload": config.workload,
        "machine": next(iter(measured.values()))["machine"],
        "series": series,
        "exponents": {name: _exponent(steps) for name, steps in series.items()},
        "time_ratio": batches[-1]["seconds"] / batches[0]["seconds"],
    }
    if images:
        from cola_train.bench.figure import draw_growth

        draw_growth(series, *images)
    return result


def growth_steps(config: BenchGrowthConfig, of_run: Sequence[str]) -> dict[str, list[GrowthStep]]:
    """The steps of each series.

    Raises:
        UserError: the workload's backbone cannot be varied, or a width is no multiple of its head
            width.
    """
    from cola_train.bench.workloads import run_config

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

    def steps(size: str, values: Sequence[int]) -> list[GrowthStep]:
        found = []
        for value in values:
            settings = family.growth_settings(run, size, value)
            if settings is None:
                raise UserError(
                    "bench growth varies the sizes of a backbone: give a workload of stage 2, not "
                    f"{config.workload}."
                )
            found.append(GrowthStep(value, base, settings))
        return found

    replace = dataclasses.replace
    return {
        "batch": [GrowthStep(rows, replace(base, rows=rows)) for rows in config.batches],
        "length": [GrowthStep(tokens, replace(base, seq_len=tokens)) for tokens in config.lengths],
        "block_size": steps("block_size", config.block_sizes),
        "layers": steps("layers", config.layers),
        "width": steps("width", config.widths),
    }


def _summary(step: GrowthStep, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "value": step.value,
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

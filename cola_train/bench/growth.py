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
from cola_train.config.settings import require
from cola_train.console import say
from cola_train.families.registry import family_of


@dataclasses.dataclass(frozen=True)
class Point:
    """A step to measure, and the size by which it differs from the others of its series."""

    value: int
    rows: int
    seq_len: int
    of_run: tuple[str, ...] = ()


def run_growth(config: BenchGrowthConfig, of_run: Sequence[str]) -> dict[str, Any]:
    """Measure the workload's step with one size at a time varied, each point in a process of its
    own; draw it where asked.

    Returns:
        `series`: by what varies ("batch", "length", "block_size", "layers", "width") its points,
        each with `value`, `seconds` (median), `tokens_per_second`, `tokens_per_second_per_gflops`,
        `growth_bytes`, `parameters` of the backbone and `flops` (executed); `exponents`: by series
        the slope of log time over log size; `time_ratio`: time at the largest batch over that
        at the smallest; and the `machine` of the first point.

    Raises:
        UserError: whatever the settings are refused for, the workload's widths among it; a figure
            that exists.
    """
    png, svg = (
        None if config.figure is None else Path(f"{config.figure}.{kind}")
        for kind in ("png", "svg")
    )
    refuse_existing(png, svg)
    series = points(config, of_run)
    measured: dict[tuple[Any, ...], dict[str, Any]] = {}
    results: dict[str, list[dict[str, Any]]] = {}
    for name, steps in series.items():
        for point in steps:
            key = (point.rows, point.seq_len, point.of_run)
            if key not in measured:
                say(
                    " ".join(
                        [f"{name} {point.value}: {point.rows} x {point.seq_len}", *point.of_run]
                    )
                )
                measured[key] = _measure(config, point, of_run)
            results.setdefault(name, []).append(_summary(point, measured[key]))
    batches = results["batch"]
    result = {
        "workload": config.workload,
        "machine": next(iter(measured.values()))["machine"],
        "series": results,
        "exponents": {name: _exponent(found) for name, found in results.items()},
        "time_ratio": batches[-1]["seconds"] / batches[0]["seconds"],
    }
    if png is not None and svg is not None:
        from cola_train.bench.figure import draw_growth

        draw_growth(results, png, svg)
    return result


def points(config: BenchGrowthConfig, of_run: Sequence[str]) -> dict[str, list[Point]]:
    """The points of each series.

    Raises:
        UserError: the workload's backbone cannot be varied, or a width is no multiple of its head
            width.
    """
    from cola_train.bench.workloads import run_config

    run = run_config(_train_config(config, Point(0, config.rows, config.seq_len)), of_run)
    family = family_of(run)

    def settings(size: str, value: int) -> tuple[str, ...]:
        found: tuple[str, ...] | None = family.growth_settings(run, size, value)
        require(
            found is not None,
            "bench growth varies the sizes of a backbone: give a workload of stage 2, not "
            f"{config.workload}.",
        )
        assert found is not None
        return found

    rows, seq_len = config.rows, config.seq_len

    def series(size: str, values: Sequence[int]) -> list[Point]:
        # The workload's own size needs no setting: it is one point for all series.
        return [Point(value, rows, seq_len, settings(size, value)) for value in values]

    return {
        "batch": [Point(value, value, seq_len) for value in config.batches],
        "length": [Point(value, rows, value) for value in config.lengths],
        "block_size": series("block_size", config.block_sizes),
        "layers": series("layers", config.layers),
        "width": series("width", config.widths),
    }


def _train_config(config: BenchGrowthConfig, point: Point) -> BenchTrainConfig:
    return BenchTrainConfig(
        threads=config.threads,
        warmups=config.warmups,
        runs=config.runs,
        workload=config.workload,
        rows=point.rows,
        seq_len=point.seq_len,
    )


def _measure(config: BenchGrowthConfig, point: Point, of_run: Sequence[str]) -> dict[str, Any]:
    return measure_in_a_process("train", _train_config(config, point), [*of_run, *point.of_run])


def _summary(point: Point, result: dict[str, Any]) -> dict[str, Any]:
    return {
        "value": point.value,
        "seconds": result["seconds"]["median"],
        "tokens_per_second": result["tokens_per_second"],
        "tokens_per_second_per_gflops": result["tokens_per_second_per_gflops"],
        "growth_bytes": result["memory"]["growth_bytes"],
        "parameters": result["backbone_parameters"],
        "flops": result["flops"]["executed"],
    }


def _exponent(found: Sequence[dict[str, Any]]) -> float | None:
    """The least-squares slope of log time over log size."""
    if len(found) < 2:
        return None
    slope, _ = statistics.linear_regression(
        [math.log(one["value"]) for one in found], [math.log(one["seconds"]) for one in found]
    )
    return slope

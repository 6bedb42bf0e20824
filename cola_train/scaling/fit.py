"""`cola-train curve fit`: power laws and compute-optimal sizes of points, as JSON and as tables."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cola_train.bootstrap import Interval
from cola_train.config.loop import Convention
from cola_train.config.settings import require
from cola_train.console import aligned
from cola_train.files import write_atomically
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.isoflop import Growth, IsoFLOP, Parabola, fit_isoflop
from cola_train.scaling.points import POINTS, Point, by_family, read_points
from cola_train.scaling.power_law import (
    LEVEL,
    Direction,
    NotFitted,
    PowerLaw,
    fit_power_law,
    frontier,
)

# The metrics of `cola-train compare` that are the better the further they fall or rise. The shares
# of repeated and of distinct 4-grams are not among them: text can be too wild as well as too bland.
DIRECTIONS: dict[str, Direction] = {
    "judge_nats_per_token": "falls",
    "bigram_divergence": "falls",
    "unigram_divergence": "falls",
    "next_word_accuracy": "rises",
    "known_word_share": "rises",
}


@dataclasses.dataclass(frozen=True)
class MetricFits:
    """The fits of one metric, by family."""

    direction: Direction
    power_laws: dict[str, PowerLaw | NotFitted]
    isoflops: dict[str, IsoFLOP]


@dataclasses.dataclass(frozen=True)
class Fits:
    """The fits of all metrics, in the order of DIRECTIONS."""

    convention: Convention
    metrics: dict[str, MetricFits]

    def to_json(self) -> dict[str, Any]:
        """What fit.json holds. Intervals are [low, high]; an open end is null."""
        power_laws, isoflop = {}, {}
        for metric, fits in self.metrics.items():
            power_laws[metric] = {name: law.to_json() for name, law in fits.power_laws.items()}
            isoflop[metric] = {name: found.to_json() for name, found in fits.isoflops.items()}
        return {
            "convention": self.convention,
            "interval_level": LEVEL,
            "power_laws": power_laws,
            "isoflop": isoflop,
        }


def write_fit(spec: CurveConfig) -> str:
    """Fit a curve's points; write fit.json and fit.txt beside them, and return fit.txt's content.

    Raises:
        UserError: no points yet, or points that cannot be fitted.
    """
    folder = Path(spec.folder)
    fits = fit_points(read_points(folder / POINTS), spec.convention)
    text = show(fits)
    write_atomically(folder / "fit.json", json.dumps(fits.to_json(), indent=1) + "\n")
    write_atomically(folder / "fit.txt", text)
    return text


def fit_points(points: Sequence[Point], convention: Convention) -> Fits:
    """Fit each metric of each family: power laws to the best sizes, parabolas to all sizes.

    Raises:
        UserError: no points, no metric with a direction, or points of a budget that differ in FLOPs
            (`points.by_budget`).
    """
    require(len(points) > 0, "There are no points to fit. `cola-train curve run` measures them.")
    found = [metric for metric in DIRECTIONS if metric in points[0].metrics]
    require(
        len(found) > 0,
        f"A fit needs one of the metrics {', '.join(DIRECTIONS)}; the points have "
        f"{', '.join(points[0].metrics) or 'none'}. `cola-train compare` measures them.",
    )
    return Fits(convention, {metric: _fit_metric(points, metric, convention) for metric in found})


def _fit_metric(points: Sequence[Point], metric: str, convention: Convention) -> MetricFits:
    fits = MetricFits(DIRECTIONS[metric], {}, {})
    for family, members in by_family(points).items():
        best = frontier(members, metric, fits.direction, convention)
        flops = np.array([point.flops[convention] for point in best], dtype=np.float64)
        values = np.array([point.metrics[metric] for point in best])
        fits.power_laws[family] = fit_power_law(flops, values, fits.direction)
        fits.isoflops[family] = fit_isoflop(members, metric, fits.direction, convention)
    return fits


def show(fits: Fits) -> str:
    """Two tables for people: power laws, then compute-optimal sizes."""
    laws = [["metric", "family", "limit", "A", "alpha", "at 10x", ""], *_power_law_rows(fits)]
    lines = [
        f"Compute is counted by the convention {fits.convention!r}; brackets hold the {LEVEL:.0%} "
        "bootstrap intervals.",
        "",
        "Power laws through the best size at each budget: limit + A (C / C0)^-alpha, or limit - A "
        "(C / C0)^-alpha where the metric",
        "rises; C0 is the least budget. Last column: the curve at 10 times the most measured "
        "compute, which is extrapolation.",
        "",
        *aligned(laws),
        "",
        "Parameters of the compute-optimal size at each budget (EFLOPs), by a parabola over log "
        "parameters; they grow as C^a.",
        "Not counted for a: (N) outside the measured sizes; - no best size, the parabola opens the "
        "wrong way; ? too few sizes.",
        "",
        *aligned(_isoflop_rows(fits)),
    ]
    return "\n".join(lines) + "\n"


def _power_law_rows(fits: Fits) -> list[list[str]]:
    rows = []
    for metric, of in fits.metrics.items():
        for family, law in of.power_laws.items():
            if isinstance(law, NotFitted):
                rows.append([metric, family, "-", "-", "-", "-", f"not fitted: {law.reason}"])
                continue
            beyond = 10 * law.flops[-1]
            numbers = [
                _number(law.limit, law.limit_interval),
                _number(law.amplitude, law.amplitude_interval),
                _number(law.exponent, law.exponent_interval),
                _number(float(law.at(np.array([beyond]))[0]), law.interval_at(beyond)),
            ]
            rows.append([metric, family, *numbers, law.note])
    return rows


def _isoflop_rows(fits: Fits) -> list[list[str]]:
    families = [found for of in fits.metrics.values() for found in of.isoflops.values()]
    budgets = sorted({budget for found in families for budget in found.parabolas})
    rows = [["metric", "family", *(f"{budget:.4g}" for budget in budgets), "a"]]
    for metric, of in fits.metrics.items():
        for family, found in of.isoflops.items():
            growth, exponent = found.growth, "-"
            if isinstance(growth, Growth):
                exponent = _number(growth.exponent, growth.exponent_interval)
            best = [_best(found.parabolas.get(budget)) for budget in budgets]
            rows.append([metric, family, *best, exponent])
    return rows


def _best(parabola: Parabola | NotFitted | None) -> str:
    if parabola is None:
        return ""
    if isinstance(parabola, NotFitted):
        return "?"
    if parabola.problem == "no best size":
        return "-"
    return f"({parabola.best:.3g})" if parabola.problem else f"{parabola.best:.3g}"


def _number(value: float, uncertainty: Interval | None) -> str:
    interval = "" if uncertainty is None else f" [{uncertainty.low:.3g}, {uncertainty.high:.3g}]"
    return f"{value:.4g}{interval}"

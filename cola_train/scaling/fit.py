"""`cola-train curve fit`: from points to power laws and compute-optimal sizes, as fit.json and as a
table.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cola_train.bootstrap import Interval
from cola_train.config.loop import Convention
from cola_train.config.settings import require
from cola_train.console import aligned
from cola_train.scaling.bootstrap import LEVEL
from cola_train.scaling.isoflop import IsoFLOP, Parabola, fit_isoflop
from cola_train.scaling.points import Point, by_family
from cola_train.scaling.power_law import Direction, NotFitted, PowerLaw, fit_power_law, frontier

# Of what `cola-train compare` measures, the figures that are the better the more they fall or rise.
# The shares of repeated and of distinct 4-grams are not among them: text can be too wild as well as
# too bland.
DIRECTIONS: dict[str, Direction] = {
    "judge_nats_per_token": "falls",
    "bigram_divergence": "falls",
    "unigram_divergence": "falls",
    "next_word_accuracy": "rises",
    "known_word_share": "rises",
}


@dataclasses.dataclass(frozen=True)
class MetricFits:
    """One metric: its fits by family."""

    direction: Direction
    power_laws: dict[str, PowerLaw | NotFitted]
    isoflops: dict[str, IsoFLOP]


@dataclasses.dataclass(frozen=True)
class Fits:
    """By metric, in the order of DIRECTIONS."""

    convention: Convention
    metrics: dict[str, MetricFits]

    def to_json(self) -> dict[str, Any]:
        """What fit.json holds. Intervals are [low, high], an end that there is not is null."""
        return {
            "convention": self.convention,
            "interval_level": LEVEL,
            "power_laws": {
                metric: _to_json(fits.power_laws) for metric, fits in self.metrics.items()
            },
            "isoflop": {metric: _to_json(fits.isoflops) for metric, fits in self.metrics.items()},
        }


def fit_points(points: Sequence[Point], convention: Convention) -> Fits:
    """Fit every metric of every family: power laws to the best size at each budget, parabolas to
    all sizes.

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


def _to_json(by_family: Mapping[str, PowerLaw | NotFitted | IsoFLOP]) -> dict[str, Any]:
    return {family: fit.to_json() for family, fit in by_family.items()}


def _fit_metric(points: Sequence[Point], metric: str, convention: Convention) -> MetricFits:
    direction = DIRECTIONS[metric]
    families = by_family(points)
    laws: dict[str, PowerLaw | NotFitted] = {}
    for family, members in families.items():
        best = frontier(members, metric, direction, convention)
        flops = np.array([point.flops[convention] for point in best], dtype=np.float64)
        laws[family] = fit_power_law(
            flops, np.array([point.metrics[metric] for point in best]), direction
        )
    isoflops = {
        family: fit_isoflop(members, metric, direction, convention)
        for family, members in families.items()
    }
    return MetricFits(direction, laws, isoflops)


def show(fits: Fits) -> str:
    """Two tables for people: power laws, then compute-optimal sizes."""
    lines = [
        (
            f"Compute is counted by the convention {fits.convention!r}; brackets hold the "
            f"{LEVEL:.0%} bootstrap intervals."
        ),
        "",
        (
            "Power laws through the best size at each budget: limit + A (C / C0)^-alpha, or limit "
            "- A (C / C0)^-alpha where the metric"
        ),
        (
            "rises; C0 is the least budget. Last column: the curve at 10 times the most measured "
            "compute, which is extrapolation."
        ),
        "",
        *aligned(
            [["metric", "family", "limit", "A", "alpha", "at 10x", ""], *_power_law_rows(fits)]
        ),
        "",
        (
            "Parameters of the compute-optimal size at each budget (EFLOPs), by a parabola over "
            "log parameters; they grow as C^a."
        ),
        (
            "Not counted for a: (N) outside the measured sizes; - no best size, the parabola opens "
            "the wrong way; ? too few sizes."
        ),
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
            rows.append(
                [
                    metric,
                    family,
                    _number(law.limit, law.limit_interval),
                    _number(law.amplitude, law.amplitude_interval),
                    _number(law.exponent, law.exponent_interval),
                    _number(float(law.at(np.array([beyond]))[0]), law.interval_at(beyond)),
                    law.note,
                ]
            )
    return rows


def _isoflop_rows(fits: Fits) -> list[list[str]]:
    of_all = [
        (metric, family, found)
        for metric, of in fits.metrics.items()
        for family, found in of.isoflops.items()
    ]
    budgets = sorted({budget for _, _, found in of_all for budget in found.parabolas})
    rows = [["metric", "family", *(f"{budget:.4g}" for budget in budgets), "a"]]
    for metric, family, found in of_all:
        growth = found.growth
        exponent = (
            "-"
            if isinstance(growth, NotFitted)
            else _number(growth.exponent, growth.exponent_interval)
        )
        rows.append(
            [metric, family, *(_best(found.parabolas.get(budget)) for budget in budgets), exponent]
        )
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
    return (
        f"{value:.4g}"
        if uncertainty is None
        else f"{value:.4g} [{uncertainty.low:.3g}, {uncertainty.high:.3g}]"
    )

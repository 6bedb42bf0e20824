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
from cola_train.scaling.frontier import Frontier, frontier
from cola_train.scaling.isoflop import Growth, IsoFLOP, fit_isoflop
from cola_train.scaling.metrics import DIRECTIONS, with_distances
from cola_train.scaling.points import POINTS, Point, by_family, read_points
from cola_train.scaling.power_law import LEVEL, Direction, NotFitted, PowerLaw, fit_power_law
from cola_train.scaling.size_curve import SizeCurve
from cola_train.scaling.surface import Surface, fit_surface


@dataclasses.dataclass(frozen=True)
class MetricFits:
    """The fits of one metric, by family."""

    direction: Direction
    frontiers: dict[str, Frontier]
    power_laws: dict[str, PowerLaw | NotFitted]
    isoflops: dict[str, IsoFLOP]
    surfaces: dict[str, Surface | NotFitted]


@dataclasses.dataclass(frozen=True)
class Fits:
    """The fits of all metrics, in the order of DIRECTIONS."""

    convention: Convention
    points: list[Point]  # with the metrics that are fitted (`metrics.with_distances`)
    metrics: dict[str, MetricFits]

    def to_json(self) -> dict[str, Any]:
        """What fit.json holds. Intervals are [low, high]; an open end is null."""
        power_laws: dict[str, Any] = {}
        isoflop: dict[str, Any] = {}
        surfaces: dict[str, Any] = {}
        for metric, fits in self.metrics.items():
            power_laws[metric] = {
                name: {"frontier": fits.frontiers[name].to_json(), **law.to_json()}
                for name, law in fits.power_laws.items()
            }
            isoflop[metric] = {name: found.to_json() for name, found in fits.isoflops.items()}
            surfaces[metric] = {name: found.to_json() for name, found in fits.surfaces.items()}
        return {
            "convention": self.convention,
            "interval_level": LEVEL,
            "power_laws": power_laws,
            "isoflop": isoflop,
            "surfaces": surfaces,
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
    """Fit each metric of each family: power laws to the frontier, curves over size at each budget,
    and L(N, D), both to all points.

    Raises:
        UserError: no points, no metric with a direction, points of a budget that differ in FLOPs
            (`points.by_budget`), or no figure of real text (`metrics.with_distances`).
    """
    require(len(points) > 0, "There are no points to fit. `cola-train curve run` measures them.")
    fitted = with_distances(points)
    found = [metric for metric in DIRECTIONS if metric in fitted[0].metrics]
    known = ", ".join(name.removesuffix("_distance") for name in DIRECTIONS)
    require(
        len(found) > 0,
        f"A fit needs one of the metrics {known}; the points have "
        f"{', '.join(points[0].metrics) or 'none'}. `cola-train compare` measures them.",
    )
    metrics = {metric: _fit_metric(fitted, metric, convention) for metric in found}
    return Fits(convention, fitted, metrics)


def _fit_metric(points: Sequence[Point], metric: str, convention: Convention) -> MetricFits:
    direction = DIRECTIONS[metric]
    fits = MetricFits(direction, {}, {}, {}, {})
    for family, members in by_family(points).items():
        best = frontier(members, metric, direction, convention)
        fits.frontiers[family] = best
        fits.power_laws[family] = fit_power_law(best.flops, best.values, direction)
        fits.isoflops[family] = fit_isoflop(members, metric, direction, convention)
        fits.surfaces[family] = fit_surface(members, metric, direction)
    return fits


def show(fits: Fits) -> str:
    """Three tables for people: power laws, compute-optimal sizes, and L(N, D)."""
    laws = [["metric", "family", "limit", "A", "alpha", "at 10x", ""], *_power_law_rows(fits)]
    surfaces = [["metric", "family", "limit", "alpha", "beta", "a", ""], *_surface_rows(fits)]
    lines = [
        f"Compute is counted by the convention {fits.convention!r}; brackets hold {LEVEL:.0%} "
        "intervals. NAME_distance is |NAME - NAME of real text|.",
        "",
        "Power laws through the best size at each budget: limit + A (C / C0)^-alpha, or limit - A "
        "(C / C0)^-alpha where the metric",
        'rises; C0 is the least budget. Which size is best the other budgets tell. "At 10x": the '
        "curve at 10 times the most measured",
        "compute, which is extrapolation.",
        "",
        *aligned(laws),
        "",
        "Parameters of the compute-optimal size at each budget (EFLOPs), by E + a N^-alpha + b "
        "N^beta over size N; they grow as C^a.",
        "Not counted for a, and without an interval: (N) outside the measured sizes; - no best "
        "size; ? too few sizes. Three points fit",
        "exactly, so nothing tells their noise: no interval.",
        "",
        *aligned(_isoflop_rows(fits)),
        "",
        "L(N, D) = limit + A / N^alpha + B / D^beta, or limit - ... where the metric rises, of all "
        "sizes N and tokens D at once, by",
        "the Huber loss of log L; if compute is 6 N D, the best size grows as C^a, "
        "a = beta / (alpha + beta).",
        "",
        *aligned(surfaces),
    ]
    return "\n".join(lines) + "\n"


def _power_law_rows(fits: Fits) -> list[list[str]]:
    rows = []
    for metric, of in fits.metrics.items():
        for family, law in of.power_laws.items():
            if isinstance(law, NotFitted):
                rows.append([metric, family, *"----", f"not fitted: {law.reason}"])
                continue
            beyond = 10 * law.flops[-1]
            numbers = [
                _number(law.limit, law.limit_interval),
                _number(law.amplitude, law.amplitude_interval),
                _number(law.exponent, law.exponent_interval),
                _number(float(law.at(np.array([beyond]))[0]), law.interval_at(beyond)),
            ]
            notes = [note for note in (law.note, of.frontiers[family].note) if note]
            rows.append([metric, family, *numbers, "; ".join(notes)])
    return rows


def _isoflop_rows(fits: Fits) -> list[list[str]]:
    families = [found for of in fits.metrics.values() for found in of.isoflops.values()]
    budgets = sorted({budget for found in families for budget in found.curves})
    rows = [["metric", "family", *(f"{budget:.4g}" for budget in budgets), "a"]]
    for metric, of in fits.metrics.items():
        for family, found in of.isoflops.items():
            growth, exponent = found.growth, "-"
            if isinstance(growth, Growth):
                exponent = _number(growth.exponent, growth.exponent_interval)
            best = [_best(found.curves.get(budget)) for budget in budgets]
            rows.append([metric, family, *best, exponent])
    return rows


def _best(curve: SizeCurve | NotFitted | None) -> str:
    if curve is None:
        return ""
    if isinstance(curve, NotFitted):
        return "?"
    if curve.problem == "no best size":
        return "-"
    if curve.problem:
        return f"({curve.best:.3g})"
    return _number(curve.best, curve.best_interval, digits=3)


def _surface_rows(fits: Fits) -> list[list[str]]:
    rows = []
    for metric, of in fits.metrics.items():
        for family, surface in of.surfaces.items():
            if isinstance(surface, NotFitted):
                rows.append([metric, family, *"----", f"not fitted: {surface.reason}"])
                continue
            numbers = [
                _number(surface.limit, surface.limit_interval),
                _number(surface.alpha, surface.alpha_interval),
                _number(surface.beta, surface.beta_interval),
                _number(surface.growth, surface.growth_interval),
            ]
            rows.append([metric, family, *numbers, ""])
    return rows


def _number(value: float, uncertainty: Interval | None, digits: int = 4) -> str:
    interval = "" if uncertainty is None else f" [{uncertainty.low:.3g}, {uncertainty.high:.3g}]"
    return f"{value:.{digits}g}{interval}"

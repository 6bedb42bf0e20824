"""`cola-train curve plot`: quality over training compute with fits, and over size by budget."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.drawing import BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW, drawing
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.fit import Fits, fit_points
from cola_train.scaling.isoflop import IsoFLOP
from cola_train.scaling.points import POINTS, Point, by_family, read_points
from cola_train.scaling.power_law import LEVEL, NotFitted, PowerLaw

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
_MARKERS = {"run": "o", "anneal": "D"}
_KINDS = {"run": "run of its own", "anneal": "anneal off a constant-rate run"}
_STAR = {"marker": "*", "markersize": 9, "markeredgecolor": "black"}
_GRAY = "0.35"
_PREFIXES = {"Y": 1e24, "Z": 1e21, "E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "": 1.0}
# How far the curves reach, in multiples of the most measured compute.
_BEYOND = 5.0
_PANEL = (4.0, 3.0)  # inches


def draw(spec: CurveConfig) -> list[Path]:
    """Draw a curve's points with their fits, as PNG and SVG; returns the files.

    Raises:
        UserError: as `fit.write_fit`.
    """
    folder = Path(spec.folder)
    fits = fit_points(read_points(folder / POINTS), spec.convention)
    files = [folder / f"{name}.{kind}" for name in ("curve", "isoflop") for kind in ("png", "svg")]
    draw_curve(fits, *files[:2])
    draw_isoflop(fits, *files[2:])
    return files


def draw_curve(fits: Fits, png: Path, svg: Path) -> None:
    """Draw quality over training compute: panels are fitted metrics, colors families.

    A star is the best size of a budget (`frontier`). The curve and its band go through the stars
    and are dashed beyond the measured compute. Bars are one standard error where points have one;
    the dotted line is the metric of real text, where that is not what the distance is measured to.
    """
    points = fits.points
    unit, name = _unit(point.flops[fits.convention] for point in points)
    entries = [
        *(Patch(color=color, label=family) for family, color in _colors(points).items()),
        *_kind_entries(points),
        _entry("best size of a budget", linestyle="none", **_STAR),
        _entry("power law through the best sizes"),
        _entry("extrapolation", linestyle="--"),
        Patch(color=_GRAY, alpha=0.2, linewidth=0, label=f"{LEVEL:.0%} interval of the curve"),
    ]
    if any(f"held_out_{metric}" in points[0].metrics for metric in fits.metrics):
        entries.append(_entry("real text", linestyle=":"))
    num_panels = len(fits.metrics)
    with _panels(num_panels, min(3, num_panels), entries, png, svg) as panels:
        for axes, metric in zip(panels, fits.metrics, strict=True):
            better = "lower" if fits.metrics[metric].direction == "falls" else "higher"
            _draw_metric(axes, fits, metric, unit)
            axes.set_title(f"{_title(metric)} ({better} is better)", loc="left")
            axes.set_xlabel(f"training compute ({name}, convention {fits.convention})")


def draw_isoflop(fits: Fits, png: Path, svg: Path) -> None:
    """Draw quality over size: rows of panels are metrics, columns families, and shades budgets.

    A star is the best size of a budget, where its curve has one inside the measured sizes; the bar
    beside it is that size's interval, if there is one.
    """
    points = fits.points
    families = by_family(points)
    budgets = sorted({point.budget for point in points})
    unit, name = _unit(budget * FLOPS_PER_EFLOP for budget in budgets)
    # The lightest shades of a map cannot be read on white.
    shades = mpl.colormaps["viridis_r"](np.linspace(0.2, 1, len(budgets)))
    colors = dict(zip(budgets, shades, strict=True))
    entries = [
        *(
            _entry(f"{budget * FLOPS_PER_EFLOP / unit:.3g} {name}", color=color, marker="o")
            for budget, color in colors.items()
        ),
        *_kind_entries(points),
        _entry("compute-optimal size", linestyle="none", **_STAR),
        _entry(f"its {LEVEL:.0%} interval", linewidth=3, alpha=0.5),
    ]
    shown = list(itertools.product(fits.metrics, families))
    with _panels(len(shown), len(families), entries, png, svg) as panels:
        for axes, (metric, family) in zip(panels, shown, strict=True):
            isoflop = fits.metrics[metric].isoflops[family]
            _draw_sizes(axes, families[family], metric, isoflop, colors)
            axes.set_title(f"{family}: {_title(metric)}", loc="left")
            axes.set_xlabel("parameters of the backbone")


def _draw_metric(axes: Any, fits: Fits, metric: str, unit: float) -> None:
    of, points, convention = fits.metrics[metric], fits.points, fits.convention
    spent = [point.flops[convention] for point in points]
    most = max(spent)
    heights = [point.metrics[metric] for point in points]
    colors = _colors(points)
    for family, members in by_family(points).items():
        for point in members:
            _draw_point(axes, point, metric, point.flops[convention] / unit, colors[family])
        best = of.frontiers[family]
        stars = {**_STAR, "color": colors[family], "linestyle": "none", "zorder": 5}
        axes.plot(best.flops / unit, best.values, **stars)
        heights += best.values.tolist()
        law = of.power_laws[family]
        if isinstance(law, PowerLaw):
            heights += _draw_law(axes, law, colors[family], unit, most)
    if (real := points[0].metrics.get(f"held_out_{metric}")) is not None:
        axes.axhline(real, color=_GRAY, linestyle=":", linewidth=1.2)
        heights.append(real)
    # The intervals' bands may be far higher than all that they are around.
    margin = 0.08 * (max(heights) - min(heights)) or 0.01
    axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set_xscale("log")
    axes.set_xlim(min(spent) / unit / 1.25, _BEYOND * most / unit)
    axes.axvspan(most / unit, _BEYOND * most / unit, color="0.94", zorder=0, linewidth=0)
    corner = {"transform": axes.transAxes, "ha": "right", "va": "top"}
    axes.text(0.99, 0.985, "extrapolation", fontsize=7, style="italic", color=_GRAY, **corner)
    _plain_ticks(axes, lambda value: f"{value:.6g}")


def _draw_law(axes: Any, law: PowerLaw, color: str, unit: float, most: int) -> list[float]:
    """Draw a law and its band; returns the heights that must be in the picture."""
    heights = []
    for start, end, style, alpha in (
        (law.flops[0], law.flops[-1], "-", 0.18),
        (law.flops[-1], _BEYOND * most, "--", 0.09),
    ):
        flops = np.geomspace(start, end, 60)
        low, high = zip(*(law.interval_at(at) for at in flops), strict=True)
        values = law.at(flops)
        axes.plot(flops / unit, values, color=color, linestyle=style, zorder=2)
        band = {"color": color, "alpha": alpha, "linewidth": 0, "zorder": 1}
        axes.fill_between(flops / unit, low, high, **band)
        heights += [float(values[0]), float(values[-1])]
    return heights


def _draw_sizes(
    axes: Any, members: Sequence[Point], metric: str, isoflop: IsoFLOP, colors: dict[float, Any]
) -> None:
    for point in members:
        _draw_point(axes, point, metric, point.parameters, colors[point.budget])
    for budget, curve in isoflop.curves.items():
        if isinstance(curve, NotFitted):
            continue
        ends = curve.parameters[0] / 1.2, curve.parameters[-1] * 1.2
        sizes = np.geomspace(*ends, 60)
        axes.plot(sizes, curve.at(sizes), color=colors[budget], linewidth=1)
        if not curve.problem:
            axes.plot(curve.best, curve.best_value, color=colors[budget], zorder=5, **_STAR)
        if curve.best_interval is not None:
            bar = np.clip(curve.best_interval, *ends)
            style = {"color": colors[budget], "linewidth": 3, "alpha": 0.5, "zorder": 2}
            axes.plot(bar, [curve.best_value] * 2, **style)
    axes.set_xscale("log")
    _plain_ticks(axes, _short)


def _draw_point(axes: Any, point: Point, metric: str, place: float, color: Any) -> None:
    axes.errorbar(
        place,
        point.metrics[metric],
        yerr=point.metrics.get(f"{metric}_standard_error", 0.0),
        color=color,
        elinewidth=0.7,
        marker=_MARKERS[point.kind],
        markersize=3.5,
        alpha=0.7,
        linestyle="none",
        zorder=3,
    )


def _title(metric: str) -> str:
    words = metric.replace("_", " ")
    return f"{of}, distance to real" if (of := words.removesuffix(" distance")) != words else words


def _colors(points: Sequence[Point]) -> dict[str, str]:
    return dict(zip(by_family(points), itertools.cycle(_COLORS)))


def _entry(label: str, **style: Any) -> Line2D:
    return Line2D([], [], label=label, **{"color": _GRAY, **style})


def _kind_entries(points: Sequence[Point]) -> list[Line2D]:
    found = {point.kind for point in points}
    return [
        _entry(label, marker=_MARKERS[kind], linestyle="none")
        for kind, label in _KINDS.items()
        if kind in found
    ]


def _unit(flops: Iterable[float]) -> tuple[float, str]:
    """The largest unit that none of these is below, and its name."""
    least = min(flops)
    return next((unit, f"{prefix}FLOPs") for prefix, unit in _PREFIXES.items() if least >= unit)


def _short(value: float) -> str:
    """A count of parameters, such as 250k or 1.8B."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _plain_ticks(axes: Any, show: Callable[[float], str]) -> None:
    """Set ticks at 1, 2 and 5 of each decade, or over many decades at 1 alone."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 3 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


@contextlib.contextmanager
def _panels(
    count: int, columns: int, entries: Sequence[Any], png: Path, svg: Path
) -> Iterator[list[Any]]:
    """Yield axes to fill, in rows of `columns`; below them is a legend of `entries`."""
    rows = math.ceil(count / columns)
    with drawing((_PANEL[0] * columns, _PANEL[1] * rows + 0.6), png, svg) as figure:
        places = range(1, count + 1)
        yield [figure.add_subplot(rows, columns, at, gid=f"panel-{at}") for at in places]
        ncols = min(len(entries), 2 * columns)
        figure.legend(handles=entries, loc="outside lower center", ncols=ncols)

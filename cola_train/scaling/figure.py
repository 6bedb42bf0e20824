"""`cola-train curve plot`: quality over training compute with the fits, and quality over size at
each budget.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.drawing import BLUE, GREEN, ORANGE, PURPLE, SKY, YELLOW, drawing
from cola_train.scaling.bootstrap import LEVEL
from cola_train.scaling.fit import Fits, MetricFits
from cola_train.scaling.points import Point, by_family
from cola_train.scaling.power_law import NotFitted, PowerLaw, frontier

_COLORS = (BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY)
_MARKERS = {"run": "o", "anneal": "D"}
_GRAY = "0.35"
_UNITS = {
    "YFLOPs": 1e24,
    "ZFLOPs": 1e21,
    "EFLOPs": 1e18,
    "PFLOPs": 1e15,
    "TFLOPs": 1e12,
    "GFLOPs": 1e9,
    "FLOPs": 1.0,
}
# How far past the most measured compute the curves go on.
_BEYOND = 5.0
_PANEL = (4.0, 3.0)  # inches


def draw_curve(points: Sequence[Point], fits: Fits, png: Path, svg: Path) -> None:
    """Draw quality over training compute, a panel a metric of the fits and a color a family.

    The curve and its band go through the best size at each budget and are dashed beyond the
    measured compute. Bars are one standard error where points have one; the dotted line is the same
    figure of real text.
    """
    columns = min(3, len(fits.metrics))
    unit, name = _unit([point.flops[fits.convention] for point in points])

    def fill(figure: Figure) -> None:
        for place, (metric, of) in enumerate(fits.metrics.items()):
            axes = _panel(figure, place, columns, -(-len(fits.metrics) // columns))
            _draw_metric(axes, points, fits, metric, of, unit)
            axes.set_title(
                f"{metric.replace('_', ' ')} ({'lower' if of.direction == 'falls' else 'higher'} "
                "is better)",
                loc="left",
            )
            axes.set_xlabel(f"training compute ({name}, convention {fits.convention})")

    entries = [
        *_family_entries(points),
        *_kind_entries(points),
        Line2D(
            [],
            [],
            color=_GRAY,
            marker="o",
            markerfacecolor="white",
            markersize=3,
            linestyle="none",
            label="not the best size of its budget",
        ),
        _entry(label="power law through the best sizes"),
        _entry(linestyle="--", label="extrapolation"),
        Patch(color=_GRAY, alpha=0.2, linewidth=0, label=f"{LEVEL:.0%} interval of the curve"),
    ]
    if any(f"held_out_{metric}" in points[0].metrics for metric in fits.metrics):
        entries.append(_entry(linestyle=":", label="real text"))
    _draw(fill, columns, -(-len(fits.metrics) // columns), entries, png, svg)


def draw_isoflop(points: Sequence[Point], fits: Fits, png: Path, svg: Path) -> None:
    """Draw quality over size, a row of panels a metric of the fits, a column a family, and a shade
    a budget.

    A star is the best size of a budget, where its parabola has one inside the measured sizes.
    """
    families = by_family(points)
    budgets = sorted({point.budget for point in points})
    unit, name = _unit([budget * FLOPS_PER_EFLOP for budget in budgets])
    # The lightest shades of a map cannot be read on white.
    shades = mpl.colormaps["viridis_r"](np.linspace(0.2, 1, len(budgets)))
    colors = dict(zip(budgets, shades, strict=True))

    def fill(figure: Figure) -> None:
        for row, (metric, of) in enumerate(fits.metrics.items()):
            for column, (family, members) in enumerate(families.items()):
                axes = _panel(
                    figure, row * len(families) + column, len(families), len(fits.metrics)
                )
                _draw_sizes(axes, members, metric, of, family, colors)
                axes.set_title(f"{family}: {metric.replace('_', ' ')}", loc="left")
                axes.set_xlabel("parameters of the backbone")

    entries = [
        *(
            _entry(color=color, marker="o", label=f"{budget * FLOPS_PER_EFLOP / unit:.3g} {name}")
            for budget, color in colors.items()
        ),
        *_kind_entries(points),
        Line2D(
            [],
            [],
            color=_GRAY,
            marker="*",
            markersize=12,
            markeredgecolor="black",
            linestyle="none",
            label="compute-optimal size",
        ),
    ]
    _draw(fill, len(families), len(fits.metrics), entries, png, svg)


def _draw_metric(
    axes: Any, points: Sequence[Point], fits: Fits, metric: str, of: MetricFits, unit: float
) -> None:
    spent = [point.flops[fits.convention] for point in points]
    most = max(spent)
    heights = [point.metrics[metric] for point in points]
    for color, (family, members) in zip(_colors(points), by_family(points).items(), strict=True):
        best = frontier(members, metric, of.direction, fits.convention)
        for point in members:
            _draw_point(
                axes,
                point,
                metric,
                point.flops[fits.convention] / unit,
                color,
                stands_out=point in best,
            )
        law = of.power_laws[family]
        if isinstance(law, PowerLaw):
            heights += _draw_law(axes, law, color, unit, most)
    if (real := points[0].metrics.get(f"held_out_{metric}")) is not None:
        axes.axhline(real, color=_GRAY, linestyle=":", linewidth=1.2)
        heights.append(real)
    # Bands may be far wider than what they are around.
    margin = 0.08 * (max(heights) - min(heights)) or 0.01
    axes.set_ylim(min(heights) - margin, max(heights) + margin)
    axes.set_xscale("log")
    axes.set_xlim(min(spent) / unit / 1.25, _BEYOND * most / unit)
    axes.axvspan(most / unit, _BEYOND * most / unit, color="0.94", zorder=0, linewidth=0)
    axes.text(
        0.99,
        0.985,
        "extrapolation",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7,
        style="italic",
        color=_GRAY,
    )
    _plain_ticks(axes, lambda value: f"{value:.6g}")


def _draw_law(axes: Any, law: PowerLaw, color: str, unit: float, most: int) -> list[float]:
    """Returns the heights that must be in the picture."""
    heights = []
    for start, end, style in (
        (law.flops[0], law.flops[-1], "-"),
        (law.flops[-1], _BEYOND * most, "--"),
    ):
        flops = np.geomspace(start, end, 60)
        low, high = zip(*(law.interval_at(at) for at in flops), strict=True)
        values = law.at(flops)
        axes.plot(flops / unit, values, color=color, linestyle=style, zorder=2)
        axes.fill_between(
            flops / unit,
            low,
            high,
            color=color,
            alpha=0.18 if style == "-" else 0.09,
            linewidth=0,
            zorder=1,
        )
        heights += [float(values[0]), float(values[-1])]
    return heights


def _draw_sizes(
    axes: Any,
    members: Sequence[Point],
    metric: str,
    of: MetricFits,
    family: str,
    colors: dict[float, Any],
) -> None:
    for point in members:
        _draw_point(axes, point, metric, point.parameters, colors[point.budget], stands_out=True)
    for budget, parabola in of.isoflops[family].parabolas.items():
        if isinstance(parabola, NotFitted):
            continue
        sizes = np.geomspace(parabola.parameters[0] / 1.2, parabola.parameters[-1] * 1.2, 60)
        axes.plot(sizes, parabola.at(sizes), color=colors[budget], linewidth=1)
        if not parabola.problem:
            height = parabola.at(np.array([parabola.best]))
            axes.plot(
                parabola.best,
                height,
                marker="*",
                markersize=12,
                color=colors[budget],
                markeredgecolor="black",
                zorder=5,
            )
    axes.set_xscale("log")
    _plain_ticks(axes, _short)


def _draw_point(
    axes: Any, point: Point, metric: str, place: float, color: Any, stands_out: bool
) -> None:
    axes.errorbar(
        place,
        point.metrics[metric],
        yerr=point.metrics.get(f"{metric}_standard_error", 0.0),
        color=color,
        elinewidth=0.7,
        marker=_MARKERS[point.kind],
        markerfacecolor=color if stands_out else "white",
        markersize=4.5 if stands_out else 3,
        markeredgewidth=0.7,
        alpha=1 if stands_out else 0.55,
        linestyle="none",
        zorder=4 if stands_out else 3,
    )


def _colors(points: Sequence[Point]) -> list[str]:
    return [_COLORS[index % len(_COLORS)] for index in range(len(by_family(points)))]


def _entry(**style: Any) -> Line2D:
    return Line2D([], [], **{"color": _GRAY, **style})


def _family_entries(points: Sequence[Point]) -> list[Patch]:
    return [
        Patch(color=color, label=family)
        for color, family in zip(_colors(points), by_family(points), strict=True)
    ]


def _kind_entries(points: Sequence[Point]) -> list[Line2D]:
    names = {"run": "run of its own", "anneal": "anneal off a constant-rate run"}
    kinds = [kind for kind in names if any(point.kind == kind for point in points)]
    return [_entry(marker=_MARKERS[kind], linestyle="none", label=names[kind]) for kind in kinds]


def _unit(flops: Sequence[float]) -> tuple[float, str]:
    """The largest unit of which all these are at least one."""
    return next((unit, name) for name, unit in _UNITS.items() if min(flops) >= unit)


def _short(value: float) -> str:
    """A count of parameters, such as 250k or 1.8B."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _plain_ticks(axes: Any, show: Callable[[float], str]) -> None:
    """Ticks at 1, 2 and 5 of each decade, or over many decades at 1 alone."""
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(high / low) < 3 else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _panel(figure: Figure, place: int, columns: int, rows: int) -> Any:
    axes = figure.add_subplot(rows, columns, place + 1)
    axes.set_gid(f"panel-{place + 1}")
    return axes


def _draw(
    fill: Callable[[Figure], None],
    columns: int,
    rows: int,
    entries: Sequence[Any],
    png: Path,
    svg: Path,
) -> None:
    with drawing((_PANEL[0] * columns, _PANEL[1] * rows + 0.6), png, svg) as figure:
        fill(figure)
        figure.legend(
            handles=entries, loc="outside lower center", ncols=min(len(entries), 2 * columns)
        )

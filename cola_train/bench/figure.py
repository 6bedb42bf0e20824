"""The picture of `cola-train bench growth`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, ScalarFormatter

from cola_train.drawing import BLUE, GREEN, drawing

_NAMES = {
    "batch": "rows of a step",
    "length": "tokens of a row",
    "block_size": "latents of a block",
    "layers": "layers of the DiT",
    "width": "width of the DiT",
}
_PANEL = (2.1, 2.0)  # inches
# From above: a measure with its unit, its key in a step's results, its divisor, its color.
_MEASURES = (
    ("seconds a step", "seconds", 1.0, BLUE),
    ("memory growth (MB)", "growth_bytes", 1e6, GREEN),
)


def draw_growth(series: Mapping[str, Sequence[Mapping[str, Any]]], png: Path, svg: Path) -> None:
    """A column for each size that varies. Dotted: growth in proportion from the first step on."""
    rows, columns = len(_MEASURES), len(series)
    with drawing((_PANEL[0] * columns, _PANEL[1] * rows), png, svg) as figure:
        grid = figure.subplots(rows, columns, sharey="row", sharex="col", squeeze=False)
        for column, (name, steps) in enumerate(series.items()):
            sizes = [step["value"] for step in steps]
            for row, (label, key, divisor, color) in enumerate(_MEASURES):
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

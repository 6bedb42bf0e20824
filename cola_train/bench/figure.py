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
# Above, the name of a measure with its unit, the key of a point, and what it is divided by.
_MEASURES = (
    ("seconds a step", "seconds", 1.0, BLUE),
    ("memory growth (MB)", "growth_bytes", 1e6, GREEN),
)


def draw_growth(series: Mapping[str, Sequence[Mapping[str, Any]]], png: Path, svg: Path) -> None:
    """A column a size that varies: time above, memory below. Dotted: growth in proportion to the
    size, from the first point on.
    """
    with drawing((_PANEL[0] * len(series), _PANEL[1] * len(_MEASURES)), png, svg) as figure:
        grid = figure.subplots(
            len(_MEASURES), len(series), sharey="row", sharex="col", squeeze=False
        )
        for column, (name, points) in enumerate(series.items()):
            sizes = [point["value"] for point in points]
            for row, (label, key, unit, color) in enumerate(_MEASURES):
                axes = grid[row][column]
                values = [point[key] / unit for point in points]
                if name != "block_size":  # which is no amount of work
                    axes.plot(
                        sizes,
                        [values[0] * size / sizes[0] for size in sizes],
                        ":",
                        color="0.5",
                        linewidth=1,
                    )
                axes.plot(sizes, values, "o-", color=color)
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(ScalarFormatter())
                axes.yaxis.set_minor_formatter(NullFormatter())
                axes.xaxis.set_major_locator(FixedLocator(sizes))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.xaxis.set_major_formatter(ScalarFormatter())
                if column == 0:
                    axes.set_ylabel(label)
                if row == len(_MEASURES) - 1:
                    axes.set_xlabel(_NAMES[name])

"""How plots look and are saved: as PNG to look at, as SVG to put elsewhere."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cola_train.files import write_atomically

# Okabe and Ito's palette, which all kinds of color vision tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, YELLOW, SKY = "#CC79A7", "#E69F00", "#56B4E9"

_STYLE = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
    # Text stays text in SVG, and two drawings of the same numbers are the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "cola_train",
}


@contextlib.contextmanager
def drawing(
    size: tuple[float, float],
    png: Path,
    svg: Path | None = None,
    style: Mapping[str, Any] | None = None,
    *,
    fits_margins: bool = True,
) -> Iterator[Figure]:
    """Yield an empty figure to fill; it is written, replacing older files, if the block succeeds.

    `size` is in inches; `style` are matplotlib's rc settings beside the common ones.
    `fits_margins`: whether margins are fitted to what stands in them. That takes about as long as
    drawing; a figure that is drawn again and again while a run waits sets its own
    (`Figure.subplots_adjust`).
    """
    with mpl.rc_context({**_STYLE, **(style or {})}):
        figure = Figure(figsize=size, layout="constrained" if fits_margins else None)
        FigureCanvasAgg(figure)
        yield figure
        for path, kind, metadata in ((png, "png", {}), (svg, "svg", {"Date": None})):
            if path is not None:
                content = io.BytesIO()
                figure.savefig(content, format=kind, metadata=metadata)
                write_atomically(path, content.getvalue())

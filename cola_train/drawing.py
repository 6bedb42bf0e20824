"""How pictures look and are saved: as PNG to look at, as SVG to put elsewhere."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cola_train.files import write_atomically

# Okabe and Ito's palette, which all kinds of colour vision tell apart.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"

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
    # Text stays text in SVG, and two drawings of the same numbers are the same bytes.
    "svg.fonttype": "none",
    "svg.hashsalt": "cola_train",
}


@contextlib.contextmanager
def drawing(size: tuple[float, float], png: Path, svg: Path, style: Mapping[str, Any] | None = None) -> Iterator[Figure]:
    """Yield an empty figure of `size` inches to fill; it is written, replacing older ones, when the block succeeds.

    `style`: matplotlib's rc settings beside the common ones.
    """
    with mpl.rc_context({**_STYLE, **(style or {})}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        for path, kind, metadata in ((png, "png", {}), (svg, "svg", {"Date": None})):
            content = io.BytesIO()
            figure.savefig(content, format=kind, dpi=150, metadata=metadata)
            write_atomically(path, content.getvalue())

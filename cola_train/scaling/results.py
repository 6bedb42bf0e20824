"""The results of a curve's points.csv: fit.json, its tables, and the figures."""

import json
from pathlib import Path

from cola_train.files import write_atomically
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.curve import POINTS
from cola_train.scaling.figure import draw_curve, draw_isoflop
from cola_train.scaling.fit import fit_points, show
from cola_train.scaling.points import read_points


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


def draw(spec: CurveConfig) -> list[Path]:
    """Draw a curve's points with their fits, as PNG and SVG; returns the files.

    Raises:
        UserError: as `write_fit`.
    """
    folder = Path(spec.folder)
    points = read_points(folder / POINTS)
    fits = fit_points(points, spec.convention)
    drawn = []
    for name, paint in (("curve", draw_curve), ("isoflop", draw_isoflop)):
        png, svg = folder / f"{name}.png", folder / f"{name}.svg"
        paint(points, fits, png, svg)
        drawn += [png, svg]
    return drawn

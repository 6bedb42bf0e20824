"""Plots of a run: every metric of metrics.jsonl over steps, training beside validation."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cola_train.drawing import BLUE, ORANGE, drawing
from cola_train.json_lines import read_log

_PANEL = (4.2, 2.8)  # inches
# The legend has a frame because a noisy loss runs behind it.
_STYLE = {
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": True,
    "lines.markersize": 3,
}
# Metrics of training are lines, those measured now and then have markers.
_OFTEN = {"color": BLUE, "linewidth": 0.8, "alpha": 0.7}
_NOW_AND_THEN = {"color": ORANGE, "marker": "o"}
Series = Mapping[str, Sequence[tuple[int, float]]]


def read_metrics(path: Path) -> Series:
    """Each metric's (step, value) pairs; of a step logged twice, after a resume, the last one."""
    series: dict[str, dict[int, float]] = {}
    for row in read_log(path):
        for name, value in row.items():
            if "/" in name and isinstance(value, (int, float)):
                series.setdefault(name, {})[row["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def draw_losses(metrics_path: Path, plot_path: Path) -> None:
    """A panel for each metric of training and validation; no plot before anything is logged."""
    series = read_metrics(metrics_path)
    names = {name.split("/", 1)[1] for name in series if name.startswith(("train/", "validation/"))}
    loss_first = sorted(names, key=lambda name: (name != "loss", name))
    _draw(series, {name: [f"train/{name}", f"validation/{name}"] for name in loss_first}, plot_path)


def draw_evaluations(metrics_path: Path, plot_path: Path, evaluators: Sequence[str]) -> None:
    """A panel for each metric of in-loop evaluation; no plot before anything is logged."""
    series = read_metrics(metrics_path)
    evaluated = [name for name in series if name.split("/", 1)[0] in evaluators]
    _draw(series, {name: [name] for name in evaluated}, plot_path)


def _draw(series: Series, panels: Mapping[str, Sequence[str]], plot_path: Path) -> None:
    """Panels by title, each of some of the series."""
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = _PANEL[0] * columns, _PANEL[1] * rows
    # Training waits for this figure: margins are set, not fitted.
    with drawing((width, height), plot_path, style=_STYLE, fits_margins=False) as figure:
        figure.subplots_adjust(
            left=0.65 / width, right=0.98, bottom=0.5 / height, top=1 - 0.3 / height, hspace=0.45
        )
        for place, (title, names) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            for name in names:
                if points := series.get(name):
                    style = _OFTEN if name.startswith("train/") else _NOW_AND_THEN
                    axes.plot(*zip(*points), label=name.split("/", 1)[0], **style)
            axes.set_title(title.replace("_", " "))
            axes.set_xlabel("optimizer step")
            axes.legend()

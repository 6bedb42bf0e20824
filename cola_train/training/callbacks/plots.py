"""Pictures of a run: every figure of metrics.jsonl over steps, training beside validation, and what
was evaluated in between.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cola_train.drawing import BLUE, ORANGE, drawing
from cola_train.files import read_log

_PANEL = (4.2, 2.8)  # inches
# The legend has a frame because a noisy loss runs behind it.
_STYLE = {
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": True,
    "lines.markersize": 3,
}


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure's (step, value) pairs, by name. A step logged twice (after a resume) keeps its
    last value.
    """
    series: dict[str, dict[int, float]] = {}
    for row in read_log(path):
        for name, value in row.items():
            if "/" in name and isinstance(value, (int, float)):
                series.setdefault(name, {})[row["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def draw_losses(metrics_path: Path, plot_path: Path) -> None:
    """A panel for each figure of training and validation; nothing is drawn before anything is
    logged.
    """
    series = read_metrics(metrics_path)
    names = {name.split("/", 1)[1] for name in series if name.startswith(("train/", "validation/"))}
    panels = {
        name: [f"train/{name}", f"validation/{name}"]
        for name in sorted(names, key=lambda name: (name != "loss", name))
    }
    _draw(series, panels, plot_path)


def draw_evaluations(metrics_path: Path, plot_path: Path, evaluators: Sequence[str]) -> None:
    """A panel for each figure of callbacks/in_loop_evaluation.py; nothing is drawn before anything
    is logged.
    """
    series = read_metrics(metrics_path)
    _draw(
        series, {name: [name] for name in series if name.split("/", 1)[0] in evaluators}, plot_path
    )


def _draw(
    series: Mapping[str, Sequence[tuple[int, float]]],
    panels: Mapping[str, Sequence[str]],
    plot_path: Path,
) -> None:
    """Panels by title, each of some of the series: those of training as lines, what is measured now
    and then with markers.
    """
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = _PANEL[0] * columns, _PANEL[1] * rows
    # Training waits for this figure.
    with drawing((width, height), plot_path, style=_STYLE, fits_margins=False) as figure:
        figure.subplots_adjust(
            left=0.65 / width, right=0.98, bottom=0.5 / height, top=1 - 0.3 / height, hspace=0.45
        )
        for place, (title, names) in enumerate(panels.items(), start=1):
            axes = figure.add_subplot(rows, columns, place)
            for name in names:
                is_training = name.startswith("train/")
                style = (
                    {"color": BLUE, "linewidth": 0.8, "alpha": 0.7}
                    if is_training
                    else {"color": ORANGE, "marker": "o"}
                )
                if points := series.get(name):
                    axes.plot(*zip(*points), label=name.split("/", 1)[0], **style)
            axes.set_title(title.replace("_", " "))
            axes.set_xlabel("optimizer step")
            axes.legend()

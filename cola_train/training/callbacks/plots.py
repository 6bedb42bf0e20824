"""Pictures of a run: every figure of metrics.jsonl over steps, training beside validation, and what was evaluated in between."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cola_train.files import read_rows, write_atomically


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure's (step, value) pairs, by name. A step logged twice (after a resume) keeps its last value."""
    series: dict[str, dict[int, float]] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if "/" in name and isinstance(value, (int, float)):
                series.setdefault(name, {})[row["step"]] = value
    return {name: sorted(points.items()) for name, points in series.items()}


def draw_losses(metrics_path: Path, plot_path: Path) -> None:
    """A panel for each figure of training and validation; nothing is drawn before anything is logged."""
    series = read_metrics(metrics_path)
    names = {name.split("/", 1)[1] for name in series if name.startswith(("train/", "validation/"))}
    panels = {name: [f"train/{name}", f"validation/{name}"] for name in sorted(names, key=lambda name: (name != "loss", name))}
    _draw(series, panels, plot_path)


def draw_watched(metrics_path: Path, plot_path: Path, instruments: Sequence[str]) -> None:
    """A panel for each figure of evaluation in training (watch.py); nothing is drawn before anything is logged."""
    series = read_metrics(metrics_path)
    _draw(series, {name: [name] for name in series if name.split("/", 1)[0] in instruments}, plot_path)


def _draw(series: Mapping[str, Sequence[tuple[int, float]]], panels: Mapping[str, Sequence[str]], plot_path: Path) -> None:
    """Panels by title, each of some of the series: those of training as lines, what is measured now and then with markers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    # Fixed margins: computing them takes as long as all the drawing.
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows))
    figure.subplots_adjust(
        left=0.65 / (4.2 * columns), right=0.98, bottom=0.5 / (2.8 * rows), top=1 - 0.3 / (2.8 * rows), hspace=0.45
    )
    FigureCanvasAgg(figure)
    for place, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, place)
        for name in names:
            style = {"linewidth": 0.8, "alpha": 0.7} if name.startswith("train/") else {"marker": "o", "markersize": 3}
            if points := series.get(name):
                axes.plot(*zip(*points), label=name.split("/", 1)[0], **style)
        axes.set_title(title.replace("_", " "), fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    working = plot_path.with_name(f".{plot_path.name}.tmp")
    figure.savefig(working, format="png", dpi=110)
    write_atomically(plot_path, working.read_bytes())
    working.unlink()

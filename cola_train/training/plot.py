"""The picture of a run: every figure of metrics.jsonl over steps, training beside validation."""

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
    """Draw a panel per figure; nothing is drawn before anything is logged."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_metrics(metrics_path)
    names = sorted(
        {name.split("/", 1)[1] for name in series if name.startswith(("train/", "validation/"))},
        key=lambda name: (name != "loss", name),
    )
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    # Fixed margins: computing them takes as long as all the drawing.
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows))
    figure.subplots_adjust(
        left=0.65 / (4.2 * columns), right=0.98, bottom=0.5 / (2.8 * rows), top=1 - 0.3 / (2.8 * rows), hspace=0.45
    )
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for kind, style in (("train", {"linewidth": 0.8, "alpha": 0.7}), ("validation", {"marker": "o", "markersize": 3})):
            if points := series.get(f"{kind}/{name}"):
                axes.plot(*zip(*points), label=kind, **style)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    working = plot_path.with_name(f".{plot_path.name}.tmp")
    figure.savefig(working, format="png", dpi=110)
    write_atomically(plot_path, working.read_bytes())
    working.unlink()

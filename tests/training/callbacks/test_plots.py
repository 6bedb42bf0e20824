"""A run's plots: every figure has a panel, and a plot that fails leaves the older one."""

import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cola_train.training.callbacks.plots import draw_evaluations, draw_losses


def write_metrics(folder: Path) -> Path:
    rows = [
        *({"step": step, "train/loss": 9.0 / step, "train/kl_nats": 1.0} for step in range(1, 9)),
        {"step": 8, "validation/loss": 2.0, "inspection/active_units": 15.0},
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_training_stands_beside_validation_and_nothing_else_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, dict[str, list[float]]]] = []
    save = Figure.savefig

    def noting(figure: Figure, *args: object, **kwargs: object) -> None:
        for axes in figure.axes:
            lines = {
                str(line.get_label()): [float(y) for y in line.get_ydata()] for line in axes.lines
            }  # type: ignore[union-attr]
            drawn.append((axes.get_title(), lines))
        save(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", noting)
    metrics = write_metrics(tmp_path)
    draw_losses(metrics, tmp_path / "losses.png")
    draw_evaluations(metrics, tmp_path / "evaluation.png", ["inspection"])
    loss = {"train": [9.0 / step for step in range(1, 9)], "validation": [2.0]}
    assert drawn == [
        ("loss", loss),
        ("kl nats", {"train": [1.0] * 8}),
        ("inspection/active units", {"inspection": [15.0]}),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        "metrics.jsonl",
        "losses.png",
        "evaluation.png",
    }
    draw_evaluations(metrics, tmp_path / "none.png", ["likelihood"])
    assert not (tmp_path / "none.png").exists()


def test_a_plot_that_fails_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, plot = write_metrics(tmp_path), tmp_path / "losses.png"
    draw_losses(metrics, plot)
    older = plot.read_bytes()
    monkeypatch.setattr(Axes, "draw", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        draw_losses(metrics, plot)
    assert plot.read_bytes() == older
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "losses.png"}

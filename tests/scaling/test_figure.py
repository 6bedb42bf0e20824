"""The pictures, read back: their panels, words and sizes."""

import struct
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from cola_train.scaling.figure import draw_curve, draw_isoflop
from cola_train.scaling.fit import Fits, fit_points
from cola_train.scaling.points import Point
from tests.scaling.ladders import BUDGETS, ladder

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return ladder(noise=0.005)


@pytest.fixture(scope="module")
def fits(points: list[Point]) -> Fits:
    return fit_points(points, "model")


def words_and_panels(svg: Path) -> tuple[Counter[str], int]:
    root = ElementTree.fromstring(svg.read_bytes())
    words = Counter("".join(text.itertext()).strip() for text in root.iter(f"{SVG}text"))
    return words, sum(group.get("id", "").startswith("panel-") for group in root.iter(f"{SVG}g"))


def png_size(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_curves(fits: Fits, tmp_path: Path) -> None:
    draw_curve(fits, tmp_path / "curve.png", tmp_path / "curve.svg")
    words, panels = words_and_panels(tmp_path / "curve.svg")
    assert panels == 2
    assert (
        words["judge nats per token, distance to real (lower is better)"]
        == words["next word accuracy (higher is better)"]
        == 1
    )
    assert words["training compute (TFLOPs, convention model)"] == 2
    assert words["extrapolation"] == 3  # in each panel and in the legend
    legend = (
        "cola",
        "ar",
        "run of its own",
        "anneal off a constant-rate run",
        "95% interval of the curve",
        "best size of a budget",
    )
    assert [words[name] for name in legend] == [1] * len(legend)
    assert words["5"] >= 1 <= words["50"]  # compute in the unit of the label
    assert png_size(tmp_path / "curve.png") == (1200, 540)


def test_sizes(fits: Fits, tmp_path: Path) -> None:
    draw_isoflop(fits, tmp_path / "isoflop.png", tmp_path / "isoflop.svg")
    words, panels = words_and_panels(tmp_path / "isoflop.svg")
    assert panels == 4
    for title in (
        "cola: judge nats per token, distance to real",
        "ar: judge nats per token, distance to real",
        "cola: next word accuracy",
        "ar: next word accuracy",
    ):
        assert words[title] == 1
    assert [words[f"{budget * 1e6:g} TFLOPs"] for budget in BUDGETS] == [1] * len(BUDGETS)
    assert words["compute-optimal size"] == words["its 95% interval"] == 1
    assert words["200k"] == words["500k"] == 4
    assert png_size(tmp_path / "isoflop.png") == (1200, 990)


def test_the_same_points_give_the_same_bytes(fits: Fits, tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw_curve(fits, tmp_path / f"{name}.png", tmp_path / f"{name}.svg")
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


def test_points_are_drawn_where_nothing_is_fitted(tmp_path: Path) -> None:
    points = [
        point
        for point in ladder(budgets=(1600.0, 1950.0), sizes={"only": 10**9})
        if point.family == "ar"
    ]
    points = [Point(**{**vars(point), "metrics": {"bigram_divergence": 0.5}}) for point in points]
    fits = fit_points(points, "model")
    draw_curve(fits, tmp_path / "curve.png", tmp_path / "curve.svg")
    words, panels = words_and_panels(tmp_path / "curve.svg")
    assert panels == 1
    assert words["training compute (ZFLOPs, convention model)"] == 1
    assert words["real text"] == words["anneal off a constant-rate run"] == 0
    draw_isoflop(fits, tmp_path / "isoflop.png", tmp_path / "isoflop.svg")
    words, panels = words_and_panels(tmp_path / "isoflop.svg")
    assert panels == 1
    assert words["1.95 ZFLOPs"] == 1

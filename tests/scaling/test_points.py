"""points.csv, there and back, and what is refused."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.settings import UserError
from cola_train.scaling.points import Point, by_budget, by_family, read_points, write_points
from tests.scaling.ladders import ladder

counts = st.integers(1, 10**27)
numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@given(
    name=names,
    count=counts,
    budget=st.floats(1e-30, 1e30),
    values=st.lists(numbers, min_size=2, max_size=2),
)
def test_points_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    count: int,
    budget: float,
    values: list[float],
) -> None:
    flops = {"paper": count, "model": count + 1, "executed": 2 * count}
    points = [
        Point(
            name, size, count, 3 * count, budget, flops, kind, {"one": values[0], "two": values[1]}
        )
        for size, kind in (("small", "run"), ("large", "anneal"), ("large", "run"))
    ]
    path = tmp_path_factory.mktemp("points") / "points.csv"
    write_points(path, points)
    assert read_points(path) == points


def test_no_points_yet(tmp_path: Path) -> None:
    write_points(tmp_path / "points.csv", [])
    assert read_points(tmp_path / "points.csv") == []


def test_columns_in_any_order(tmp_path: Path) -> None:
    points = ladder()[:2]
    write_points(tmp_path / "points.csv", points)
    rows = [line.split(",") for line in (tmp_path / "points.csv").read_text().splitlines()]
    (tmp_path / "turned.csv").write_text("".join(",".join(reversed(row)) + "\n" for row in rows))
    assert read_points(tmp_path / "turned.csv") == points


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("budget_eflops,", "", "lacks budget_eflops"),
        ("flops_paper,", "flops_pap,", "lacks flops_paper"),
        ("next_word_accuracy", "judge_nats_per_token", "own name"),
        (",100000,", ",1e5,", "line 2: parameters must be a whole number above 0, not '1e5'"),
        (",100000,", ",-3,", "parameters must be a whole number above 0, not '-3'"),
        (",3e-06,", ",0,", "budget_eflops must be above 0, not '0'"),
        (",3e-06,", ",much,", "budget_eflops must be a finite number, not 'much'"),
        (",3.0,", ",nan,", "held_out_judge_nats_per_token must be a finite number, not 'nan'"),
        (",3.0,", ",,", "held_out_judge_nats_per_token must be a finite number, not ''"),
        (",3.0,", ",inf,", "must be a finite number, not 'inf'"),
        (",3.0,", ",", "columns are needed"),
        ("anneal", "guess", "kind must be run or anneal, not 'guess'"),
        ("cola", "", "family must be a name"),
        ("medium", "small", "lines 2 and 3 are the same point"),
        ("cola", '"cola', "must be CSV"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "points.csv"
    write_points(path, ladder()[:2])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read_points(path)


def test_no_file_an_empty_one_and_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no measured points at .*curve run"):
        read_points(tmp_path / "points.csv")
    for content in (b"", b"\xff\xfe\x00"):
        (tmp_path / "points.csv").write_bytes(content)
        with pytest.raises(UserError, match="must be CSV in UTF-8 with a header"):
            read_points(tmp_path / "points.csv")


def test_families_and_budgets() -> None:
    points = ladder(budgets=(2e-6, 1e-6))
    families = by_family(points)
    assert list(families) == ["cola", "ar"]
    budgets = by_budget(reversed(families["ar"]), "model")
    assert list(budgets) == [1e-6, 2e-6]
    assert [point.size for point in budgets[1e-6]] == ["small", "medium", "large", "huge"]
    assert sorted(map(id, itertools.chain(*budgets.values()))) == sorted(map(id, families["ar"]))


@pytest.mark.parametrize("share, is_refused", [(1.04, False), (1.06, True)])
def test_a_budget_is_one_amount_of_compute(share: float, is_refused: bool) -> None:
    one, other = ladder()[:2]
    other = dataclasses.replace(
        other, flops=other.flops | {"paper": round(one.flops["paper"] * share)}
    )
    assert by_budget([one, other], "model") == {3e-6: [one, other]}
    if is_refused:
        with pytest.raises(
            UserError, match=r"same FLOPs within 5%.*cola at 3e-06 EFLOPs spent 6e\+12 to .*'paper'"
        ):
            by_budget([one, other], "paper")
    else:
        assert by_budget([one, other], "paper") == {3e-6: [one, other]}

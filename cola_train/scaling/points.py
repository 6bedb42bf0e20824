"""Points of a scaling curve: what was trained, its cost and metrics; and the file points.csv."""

import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from cola_train.config.content import read_bytes
from cola_train.config.loop import Convention
from cola_train.config.settings import UserError, require
from cola_train.files import read_errors_explained, write_atomically

POINTS = "points.csv"
_CONVENTIONS: tuple[Convention, ...] = ("paper", "model", "executed")
_COLUMNS = (
    "family",
    "size",
    "parameters",
    "tokens",
    "budget_eflops",
    "kind",
    *(f"flops_{name}" for name in _CONVENTIONS),
)
_KINDS = ("run", "anneal")
_NEXT = "Correct it, or let `cola-train curve run` write it again."
# One optimizer step more or less is all that points of a budget should differ by.
_MOST_DIFFERENCE = 0.05


@dataclasses.dataclass(frozen=True)
class Point:
    """One model, trained and measured."""

    family: str
    size: str
    parameters: int  # of the backbone
    tokens: int  # seen in training, padding included
    budget: float  # EFLOPs it was trained for; points of the same budget belong together
    flops: dict[str, int]  # what it cost, by convention ("paper", "model", "executed")
    # "run", trained from its first step for this budget; "anneal", branched off a run at a constant
    # learning rate.
    kind: str
    # The standard error of NAME is NAME_standard_error; held_out_NAME is that figure of real text.
    metrics: dict[str, float]


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Write a CSV file, a line for each point and a column for each metric, without rounding."""
    metrics = list(points[0].metrics) if points else []
    assert all(point.metrics.keys() == set(metrics) for point in points)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *metrics])
    for point in points:
        row = [point.family, point.size, point.parameters, point.tokens, repr(point.budget)]
        row += [point.kind, *(point.flops[name] for name in _CONVENTIONS)]
        writer.writerow([*row, *(repr(point.metrics[name]) for name in metrics)])
    write_atomically(path, text.getvalue())


def read_points(path: Path) -> list[Point]:
    """Read what `write_points` wrote, or a table made by hand: columns in any order.

    Columns that a point has no attribute for are metrics.

    Raises:
        UserError: no such file, missing or repeated columns, a line that is cut short, a value that
            is no number or out of range, an unknown kind, or two lines for one point.
    """
    problem = f"There are no measured points at {path}. `cola-train curve run` writes them."
    require(path.is_file(), problem)
    try:
        with read_errors_explained(path):
            text = read_bytes(path).decode("utf-8-sig")
        header, *rows = csv.reader(io.StringIO(text, newline=None), strict=True)
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path} is not a table of points: it must be CSV in UTF-8 with a header. {_NEXT}"
        ) from error
    missing = [name for name in _COLUMNS if name not in header]
    require(
        not missing,
        f"{path} must have the columns {', '.join(_COLUMNS)}; it lacks {', '.join(missing)}. "
        f"{_NEXT}",
    )
    require(
        len(set(header)) == len(header),
        f"Each column of {path} must have its own name, but its header is {header}. {_NEXT}",
    )
    points: list[Point] = []
    lines: dict[tuple[str, str, float, str], int] = {}
    for line, row in enumerate(rows, start=2):
        require(
            len(row) == len(header),
            f"{path}, line {line}: {len(header)} columns are needed, not {len(row)}. {_NEXT}",
        )
        point = _point(dict(zip(header, row, strict=True)), f"{path}, line {line}")
        key = (point.family, point.size, point.budget, point.kind)
        require(
            key not in lines,
            f"{path}: lines {lines.get(key)} and {line} are the same point: family {point.family}, "
            f"size {point.size}, {point.budget:g} EFLOPs, kind {point.kind}. Remove one of them.",
        )
        lines[key] = line
        points.append(point)
    return points


def _point(row: dict[str, str], where: str) -> Point:
    def check(is_right: bool, name: str, rule: str) -> None:
        require(is_right, f"{where}: {name} must be {rule}, not {row[name]!r}. {_NEXT}")

    def whole(name: str) -> int:
        check(row[name].isdecimal() and int(row[name]) > 0, name, "a whole number above 0")
        return int(row[name])

    def real(name: str) -> float:
        try:
            value = float(row[name])
        except ValueError:
            value = math.nan
        check(math.isfinite(value), name, "a finite number")
        return value

    check(row["family"] != "", "family", "a name")
    check(row["size"] != "", "size", "a name")
    check(row["kind"] in _KINDS, "kind", " or ".join(_KINDS))
    check(real("budget_eflops") > 0, "budget_eflops", "above 0")
    return Point(
        family=row["family"],
        size=row["size"],
        parameters=whole("parameters"),
        tokens=whole("tokens"),
        budget=real("budget_eflops"),
        flops={name: whole(f"flops_{name}") for name in _CONVENTIONS},
        kind=row["kind"],
        metrics={name: real(name) for name in row if name not in _COLUMNS},
    )


def by_family(points: Iterable[Point]) -> dict[str, list[Point]]:
    """Each family's points, families in the order of their first points."""
    families: dict[str, list[Point]] = {}
    for point in points:
        families.setdefault(point.family, []).append(point)
    return families


def by_budget(points: Iterable[Point], convention: Convention) -> dict[float, list[Point]]:
    """One family's points by budget (EFLOPs); budgets rise, and parameters within each.

    Raises:
        UserError: points of a budget whose FLOPs by `convention` differ by more than 5%.
    """
    budgets: dict[float, list[Point]] = {}
    for point in sorted(points, key=lambda point: (point.budget, point.parameters)):
        budgets.setdefault(point.budget, []).append(point)
    for budget, members in budgets.items():
        flops = [member.flops[convention] for member in members]
        require(
            max(flops) <= (1 + _MOST_DIFFERENCE) * min(flops),
            f"Points of one budget must have spent the same FLOPs within {_MOST_DIFFERENCE:.0%}, "
            f"but those of {members[0].family} at {budget:g} EFLOPs spent {min(flops):.4g} to "
            f"{max(flops):.4g} by the convention {convention!r}. Set the convention that the "
            "budgets were counted by, or train by smaller steps.",
        )
    return budgets

"""A study's table as text: on the console, as Markdown, as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cola_train.console import aligned
from cola_train.files import write_atomically
from cola_train.scaling.study.config import COMPARISON, StudyConfig
from cola_train.scaling.study.results import RESULTS, Results
from cola_train.scaling.study.seeds import FEWEST, SeedMean
from cola_train.scaling.study.table import COSTS, Row, Table, make_table
from cola_train.scaling.study.trials import TrialRun, trial_runs

TABLE, TABLE_CSV = "table.md", "table.csv"
_NONE = "-"
_COST_HEADINGS = dict(zip(COSTS, ("CPU s", "s", "tokens", "EFLOPs"), strict=True))


def write_table(spec: StudyConfig, runs: Sequence[TrialRun], results: Results) -> Table:
    """Write table.md and table.csv into the study's folder, from what is known by now."""
    table = make_table(spec, runs, results)
    folder = Path(spec.folder)
    write_atomically(folder / TABLE, as_markdown(table, folder.name))
    write_atomically(folder / TABLE_CSV, as_csv(table))
    return table


def show_table(spec: StudyConfig, spec_folder: Path, by_figure: bool = False) -> str:
    """The table for the console, from results.jsonl alone; its files are written anew.

    Raises:
        UserError: an error in the spec, in a run's config or in results.jsonl.
    """
    results = Results(Path(spec.folder) / RESULTS)
    return as_text(write_table(spec, trial_runs(spec, spec_folder), results), by_figure)


def as_markdown(table: Table, name: str) -> str:
    """A page with the table and what must be known to read it."""
    header = ["trial", "why", "overrides", *_headings(table)]
    rows = []
    for row in table.rows:
        overrides = " ".join(f"`{text}`" for text in row.overrides)
        rows.append([row.trial, row.why, overrides, *_cells(row)])
    lines = ["| " + " | ".join(_escaped(text) for text in row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + " --- |" * len(header))
    unfinished = [f"- {text}" for row in table.rows for text in row.unfinished]
    parts = [f"# Study {name}", "\n".join(lines), *_explanation(table), *table.notes]
    if unfinished:
        parts += ["Not measured:", "\n".join(unfinished)]
    return "\n\n".join(parts) + "\n"


def as_text(table: Table, by_figure: bool = False) -> str:
    """For the console: figures by trial, then what each trial is.

    With `by_figure` a line is a figure, and a column a trial: for few trials.
    """
    rows = [["", *_headings(table)], *([row.trial, *_cells(row)] for row in table.rows)]
    if by_figure:
        rows = [list(line) for line in zip(*rows, strict=True)]
    lines = [*aligned(rows, numbers=True), ""]
    for row in table.rows:
        overrides = f" [{' '.join(row.overrides)}]" if row.overrides else ""
        lines.append(f"{row.trial}: {row.why or 'no reason is given'}{overrides}")
    lines += ["", *_explanation(table), *table.notes]
    lines += [text for row in table.rows for text in row.unfinished]
    return "\n".join(lines) + "\n"


def as_csv(table: Table) -> str:
    """A line a trial, without rounding; what is not known is empty."""
    header = ["trial", "why", "overrides", "runs", "measured", "unfinished"]
    for column in table.columns:
        header += [column, *(f"{column}{end}" for end in ("_half_width", "_seeds"))]
        header += [f"{column}_less_first{end}" for end in ("", "_half_width", "_seeds")]
    header += COSTS
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in table.rows:
        done = row.num_runs - len(row.unfinished)
        values: list[object] = [row.trial, row.why, " ".join(row.overrides), row.num_runs, done]
        values.append("; ".join(row.unfinished))
        for cell in row.cells:
            values += _numbers(None if cell is None else cell.value)
            values += _numbers(None if cell is None else cell.difference)
        values += ["" if cost is None else repr(cost.mean) for cost in row.costs]
        writer.writerow(values)
    return text.getvalue()


def _headings(table: Table) -> list[str]:
    headings = []
    for column in table.columns:
        by, _, figure = column.removeprefix(COMPARISON).rpartition("/")
        headings.append(f"{figure} ({by})" if column.startswith(COMPARISON) else column)
    return ["runs", *headings, *_COST_HEADINGS.values()]


def _cells(row: Row) -> list[str]:
    done = row.num_runs - len(row.unfinished)
    cells = [f"{done} of {row.num_runs}" if row.unfinished else str(row.num_runs)]
    for cell in row.cells:
        text = _NONE if cell is None else _shown(cell.value)
        if cell is not None and cell.difference is not None:
            text += f" [{_shown(cell.difference, '+')}]"
        cells.append(text + (" (*)" if cell is not None and cell.is_apart else ""))
    return cells + [_NONE if cost is None else f"{cost.mean:.4g}" for cost in row.costs]


def _shown(found: SeedMean, sign: str = "") -> str:
    if found.half_width is not None:
        return f"{found.mean:{sign}.4g} ± {found.half_width:.2g}"
    return f"{found.mean:{sign}.4g} ({found.num_seeds})"


def _explanation(table: Table) -> list[str]:
    first = table.rows[0].trial
    return [
        f"Means over seeds. ±: 95 % interval by Student's t, from {FEWEST} seeds on; (1), (2): of "
        f"one seed or two, which have no interval. [ ]: less {first}, paired by the seeds that "
        "both have. Costs are of a run's own training; those of {NAME} in its overrides come on "
        "top."
    ]


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _numbers(found: SeedMean | None) -> list[str]:
    if found is None:
        return ["", "", "0"]
    width = "" if found.half_width is None else repr(found.half_width)
    return [repr(found.mean), width, str(found.num_seeds)]

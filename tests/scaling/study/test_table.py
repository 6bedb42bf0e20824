"""The table's figures against hand computation; what is missing or was judged otherwise is said."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from cola_train.run_folder import Status, write_status
from cola_train.scaling.study.config import StudyConfig
from cola_train.scaling.study.measuring import is_measured, parts
from cola_train.scaling.study.results import Result, Results
from cola_train.scaling.study.seeds import SeedMean
from cola_train.scaling.study.table import Row, Table, make_table
from cola_train.scaling.study.table_text import as_csv, as_markdown, as_text, show_table
from cola_train.scaling.study.trials import TrialRun
from tests.scaling.study.specs import read, write_study

PART = "comparison/unguided"
JUDGE = f"{PART}/judge_nats_per_byte"
# By trial and seed: flow loss, and nats per byte by the judge.
FIGURES = {
    ("base", 1): (1.25, 1.98),
    ("base", 2): (1.35, 2.08),
    ("base", 3): (1.15, 1.88),
    ("muon", 1): (1.05, 1.68),
    ("muon", 2): (1.16, 1.78),
    ("muon", 3): (0.94, 1.58),
    ("late", 2): (1.30, 2.00),
    ("ar", 1): (None, 1.41),
}


def make_study(folder: Path) -> tuple[StudyConfig, list[TrialRun], Path]:
    start = "init_vae_from=v"
    path = write_study(
        folder,
        "data",
        seeds=[1, 2, 3],
        trials={
            "base": {"why": "the recipe", "settings": [start]},
            "muon": {"why": "a | b", "settings": [start, "optim.optimizer=muon"]},
            "late": {"settings": [start, "optim.beta1=0.5"], "seeds": [2, 4, 5]},
            "ar": {"config": "ar.yaml", "seeds": [1]},
        },
        comparisons={"unguided": {}},
    )
    return *read(path), path


def fill(
    spec: StudyConfig, runs: list[TrialRun], conditions: Mapping[str, Mapping[str, object]]
) -> Results:
    results = Results(Path(spec.folder) / "results.jsonl")
    for run in runs:
        if (run.trial, run.seed) not in FIGURES:
            continue
        flow, judge = FIGURES[run.trial, run.seed]
        figures = {"metrics": {}, PART: {"judge_nats_per_byte": judge}}
        if flow is not None:
            figures["inspection"] = {"flow_mse": flow}
        cost = {"cpu_seconds": 100.0 * run.seed, "tokens": 4096, "eflops_model": 1.5e-5}
        judged = {PART: conditions.get(run.trial, {"order": 6, "rows": 64})}
        measured = parts(spec, run)
        results.put(Result(run.trial, run.seed, run.made_of, figures, cost, measured, judged, None))
    return results


def summed(folder: Path, conditions: Mapping[str, Mapping[str, object]] | None = None) -> Table:
    spec, runs, _ = make_study(folder)
    return make_table(spec, runs, fill(spec, runs, conditions or {}))


def value(row: Row, place: int) -> SeedMean:
    cell = row.cells[place]
    assert cell is not None
    return cell.value


def difference(row: Row, place: int) -> SeedMean | None:
    cell = row.cells[place]
    assert cell is not None
    return cell.difference


def test_means_intervals_and_paired_differences_by_hand(tmp_path: Path) -> None:
    table = summed(tmp_path)
    assert table.columns == ["flow_mse", JUDGE]
    base, muon, late, ar = table.rows
    about = pytest.approx
    # Standard deviation 0.1 over three seeds: 4.302653 x 0.1 / sqrt(3).
    assert value(base, 0) == SeedMean(about(1.25), about(0.248414, abs=1e-6), 3)
    assert difference(base, 0) is None
    # Differences -0.20, -0.19 and -0.21: ten times narrower than either trial.
    assert difference(muon, 0) == SeedMean(about(-0.2), about(0.0248414, abs=1e-6), 3)
    # The same at every seed.
    assert difference(muon, 1) == SeedMean(about(-0.3), about(0, abs=1e-9), 3)
    assert value(late, 0) == SeedMean(1.3, None, 1)
    assert difference(late, 0) == SeedMean(about(-0.05), None, 1)
    assert ar.cells[0] is None
    assert [None if cost is None else cost.mean for cost in muon.costs] == [200, None, 4096, 1.5e-5]


def test_the_page_says_how_sure_each_figure_is(tmp_path: Path) -> None:
    table = summed(tmp_path)
    page = as_markdown(table, "x")
    assert "| trial | why | overrides | runs | flow_mse | judge_nats_per_byte (unguided) |" in page
    assert "| 1.05 ± 0.27 [-0.2 ± 0.025] |" in page
    assert (
        "| late |  | `init_vae_from=v` `optim.beta1=0.5` | 1 of 3 | 1.3 (1) [-0.05 (1)] |" in page
    )
    assert "| ar |  | `ar.yaml` | 1 | - | 1.41 (1) [-0.57 (1)] | 100 | - | 4096 | 1.5e-05 |" in page
    assert "a \\| b" in page
    assert "- late-4 is not trained\n- late-5 is not trained\n" in page
    assert "less base, paired by the seeds" in page
    # Every row has as many cells as the header.
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    text = as_text(table)
    assert "muon: a | b [init_vae_from=v optim.optimizer=muon]" in text
    assert "late-5 is not trained" in text


def test_the_csv_has_what_the_table_has_without_rounding(tmp_path: Path) -> None:
    table = summed(tmp_path)
    rows = [*csv.DictReader(io.StringIO(as_csv(table)))]
    assert [row["trial"] for row in rows] == ["base", "muon", "late", "ar"]
    less = difference(table.rows[1], 0)
    assert less is not None
    assert float(rows[1]["flow_mse_less_first"]) == less.mean
    assert float(rows[1]["flow_mse_less_first_half_width"]) == less.half_width
    assert rows[1]["flow_mse_seeds"] == "3"
    assert (rows[2]["flow_mse_half_width"], rows[2]["measured"]) == ("", "1")
    assert rows[3]["flow_mse"] == ""


def test_figures_that_were_judged_otherwise_have_no_difference(tmp_path: Path) -> None:
    # What plays no part for a family is not among its conditions.
    conditions = {"ar": {"order": 6}, "muon": {"order": 6, "rows": 128}}
    table = summed(tmp_path, conditions)
    _, muon, _, ar = table.rows
    assert difference(muon, 1) is None
    assert difference(muon, 0) is not None
    assert difference(ar, 1) is not None
    assert table.notes == [
        "No result has flow_minus_unigram, flow_minus_bigram, comparison/distinct_4word_share.",
        "(*) muon is judged otherwise, comparison/unguided: rows (128, not 64).",
    ]
    assert "1.68 ± 0.25 (*)" in as_markdown(table, "x")


def test_what_failed_or_changed_is_said(tmp_path: Path) -> None:
    spec, runs, path = make_study(tmp_path)
    results = fill(spec, runs, {})
    late, ar = (next(run for run in runs if run.name == name) for name in ("late-4", "ar-1"))
    results.put(Result("late", 4, late.made_of, {}, {}, {}, {}, "at step 7: loss is nan"))
    write_folder = Path(spec.folder) / "late-5"
    write_folder.mkdir()
    write_status(write_folder, Status("interrupted", 5, "SIGTERM"))
    known = results.of(ar)
    assert known is not None
    results.put(Result("ar", 1, ar.made_of, {}, {}, {}, {}, None))
    results.put(Result("gone", 1, {}, {}, {}, {}, {}, None))
    text = show_table(spec, path.parent)
    assert "late-4 failed at step 7: loss is nan" in text
    assert "late-5 is interrupted at step 5, not measured" in text
    assert "ar-1 lacks comparison/unguided" in text
    assert "There are results of trials that the spec lacks: gone." in text
    changed = json.loads(path.read_text())
    changed["trials"]["muon"]["settings"][1] = "optim.optimizer=adamw"
    changed["trials"]["muon"]["settings"].append("optim.beta1=0.25")
    path.write_text(json.dumps(changed))
    text = show_table(*(read(path)[0], path.parent))
    assert (
        "muon-1 is not trained (there is a result of other settings: optim.optimizer: muon, now "
        "the default; optim.beta1: the default, now 0.25)" in text
    )


def test_columns_are_figures_and_an_unknown_one_is_said(tmp_path: Path) -> None:
    spec, runs, path = make_study(tmp_path)
    fill(spec, runs, {})
    changed = json.loads(path.read_text())
    changed["columns"] = [JUDGE, "flow_msee"]
    path.write_text(json.dumps(changed))
    text = show_table(read(path)[0], path.parent)
    assert "No result has flow_msee (did you mean 'flow_mse'?).\n" in text
    assert "flow_mse " not in text.splitlines()[0]


def test_figures_that_were_made_with_other_settings_are_not_shown(tmp_path: Path) -> None:
    spec, runs, path = make_study(tmp_path)
    fill(spec, runs, {})
    changed = json.loads(path.read_text())
    changed["comparisons"]["unguided"]["num_openings"] = 8
    path.write_text(json.dumps(changed))
    text = show_table(read(path)[0], path.parent)
    assert text.splitlines()[0].split()[:2] == ["runs", "flow_mse"]
    assert "judge_nats_per_byte" not in text.splitlines()[0]
    assert "base-1 lacks comparison/unguided" in text


def test_a_run_of_which_nothing_is_asked_is_measured_once_it_is_known(tmp_path: Path) -> None:
    path = write_study(tmp_path, "data", comparisons={}, trials={"ar": {"config": "ar.yaml"}})
    spec, (run,) = read(path)
    assert not is_measured(spec, run, None)
    result = Result("ar", 66, run.made_of, {"metrics": {}}, {}, {}, {}, None)
    assert is_measured(spec, run, result)
    assert not is_measured(spec, run, dataclasses.replace(result, failure="at step 1"))


def test_a_table_by_figure_has_the_cells_of_the_other(tmp_path: Path) -> None:
    spec, runs, _ = make_study(tmp_path)
    table = make_table(spec, runs, fill(spec, runs, {}))
    by_trial = [line.split() for line in as_text(table).splitlines()]
    by_figure = [line.split() for line in as_text(table, by_figure=True).splitlines()]
    assert by_figure[0] == ["base", "muon", "late", "ar"]
    base = next(line for line in by_trial if line[:1] == ["base"])
    flow = next(line for line in by_figure if line[:1] == ["flow_mse"])
    assert base[2:5] == flow[1:4] == ["1.25", "±", "0.25"]

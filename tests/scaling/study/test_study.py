"""A study is trained and measured once; what it has is kept whatever becomes of its runs."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cola_train.cli import main
from cola_train.json_lines import json_lines, read_log
from tests.scaling.study.specs import SHORT, write_study

TRIALS = {
    "base": {"why": "the recipe", "settings": ["init_vae_from={first}"]},
    "mad": {
        "config": "ar.yaml",
        "settings": [
            "optim.learning_rate=1e30",
            "optim.weight_decay=0",
            "guard.max_skipped_in_a_row=1",
            "trainer.max_steps=20",
        ],
    },
    "ar": {"config": "ar.yaml"},
    "first": {"why": "what base starts from", "config": "vae.yaml"},
}


def study(path: Path, *rest: str) -> int:
    return main(["study", "run", str(path), *rest])


def done(said: str, *what: str) -> set[str]:
    """The runs of which `study run` said that something was done to them; anything by default."""
    begins = tuple(f" {word}" for word in what or ("training", "inspecting", "comparing"))
    parts = [line.partition(":") for line in said.splitlines()]
    return {name for name, _, rest in parts if rest.startswith(begins)}


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["trial"]: row for row in read_log(folder / "results.jsonl")}


@pytest.mark.slow
def test_a_study_is_run_once_and_its_results_outlive_its_runs(
    tmp_path: Path, prepared_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = {"trials": TRIALS, "comparisons": {"unguided": SHORT}}
    path, folder = write_study(tmp_path, prepared_folder, **changes), tmp_path / "study"
    assert study(path, "--parallel", "2") == 1
    said = capfd.readouterr().err
    assert done(said, "training") == {"first-66", "base-66", "ar-66", "mad-66"}
    assert "mad-66 failed: cola-train: error: Optimizer step" in said
    assert "3 of 4 runs are measured" in said
    assert "Not finished: mad-66." in said
    first = results_of(folder)
    assert first.keys() == TRIALS.keys()
    check_figures(folder, first)
    check_table(folder, first)

    # Nothing is left to do; what has failed is told, and tried again where that is asked for.
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("metrics.jsonl")}
    assert study(path) == 1
    said = capfd.readouterr().err
    assert not done(said)
    assert "mad-66 had failed at step" in said
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert study(path, "--retry") == 1
    assert done(capfd.readouterr().err, "training") == {"mad-66"}

    # Results are enough, wherever they were made.
    for name in ("first-66", "base-66", "mad-66"):
        shutil.rmtree(folder / name)
    assert study(path) == 1
    assert not done(capfd.readouterr().err)
    assert results_of(folder)["base"] == first["base"]

    # Without its line a trial is done again, and what it starts from where that is gone.
    lines = [row for name, row in results_of(folder).items() if name != "base"]
    (folder / "results.jsonl").write_text(json_lines(lines), encoding="utf-8")
    assert study(path) == 1
    said = capfd.readouterr().err
    assert done(said, "training") == {"first-66", "base-66"}
    assert done(said, "inspecting") == {"base-66"}
    again = results_of(folder)
    assert again["first"] == first["first"]
    assert again["base"]["figures"] == first["base"]["figures"]

    # A comparison that is new is made of the runs that are there.
    shutil.rmtree(folder / "base-66")
    changes["comparisons"] = {"unguided": SHORT, "knobs": {**SHORT, "sampler": {"top_k": 3}}}
    assert study(write_study(tmp_path, prepared_folder, **changes)) == 1
    said = capfd.readouterr().err
    assert done(said, "comparing, knobs") == {"ar-66"} == done(said)
    assert "base-66 is not measured as the spec says (comparison/knobs), and its run" in said
    assert "2 of 4 runs are measured" in said
    parts = results_of(folder)["ar"]["figures"]
    assert parts.keys() == {"metrics", "comparison/unguided", "comparison/knobs"}
    assert parts["comparison/knobs"]["judge_nats_per_byte"] > 0


def check_figures(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Each line has what the run's own files have."""
    for trial, row in results.items():
        run, figures, cost = folder / f"{trial}-66", row["figures"], row["cost"]
        if trial == "mad":
            assert not figures
            assert "Optimizer step" in row["failure"]
            continue
        has_latents = trial in ("base", "first")
        assert (run / "inspection").exists() == has_latents
        if has_latents:
            page = json.loads((run / "inspection" / "inspection.json").read_text())["figures"]
            found = {name: value for name, value in page.items() if value is not None}
            assert figures["inspection"] == found
        metrics = [*read_log(run / "metrics.jsonl")]
        (validated,) = [line for line in metrics if "validation/loss" in line]
        assert figures["metrics"]["validation/loss"] == validated["validation/loss"]
        compared = [line for line in metrics if "comparison_conditions" in line]
        assert len(compared) == (trial != "first")
        for line in compared:
            for name in ("judge_nats_per_byte", "distinct_4word_share"):
                assert figures["comparison/unguided"][name] == line[f"comparison/{name}"]
        summary = json.loads((run / "summary.json").read_text())
        assert cost["cpu_seconds"] == summary["cpu_seconds"] > 0
        assert cost["eflops_model"] == summary["eflops"]["model"]
        assert cost["tokens"] == 2 * 4 * 32


def check_table(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """The table has a line a trial, in the spec's order, with the figures of the results."""
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["trial"]: row for row in csv.DictReader(file)}
    assert [*rows] == [*TRIALS]
    figures = {trial: row["figures"] for trial, row in results.items()}
    bigram = figures["base"]["inspection"]["flow_minus_bigram"]
    assert float(rows["base"]["flow_minus_bigram"]) == bigram
    ar, base = (figures[name]["comparison/unguided"] for name in ("ar", "base"))
    less = ar["judge_nats_per_byte"] - base["judge_nats_per_byte"]
    column = "comparison/unguided/judge_nats_per_byte_less_first"
    assert float(rows["ar"][column]) == less
    assert (rows["ar"]["flow_mse"], rows["mad"]["measured"]) == ("", "0")
    assert rows["mad"]["unfinished"].startswith("mad-66 failed at step")
    assert "- mad-66 failed at step" in (folder / "table.md").read_text(encoding="utf-8")


def test_missing_data_is_said_before_anything_is_trained(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert study(write_study(tmp_path, tmp_path / "nowhere")) == 2
    assert "There is no prepared data folder" in capfd.readouterr().err
    assert not (tmp_path / "study").exists()

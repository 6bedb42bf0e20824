"""A study is trained and measured once; what it has is kept whatever becomes of its runs."""

import csv
import json
from pathlib import Path

import pytest

from cola_train.cli import main
from cola_train.json_lines import read_log
from tests.scaling.study.specs import COMPARISONS, write_study


def study(kind: str, path: Path, *rest: str) -> int:
    return main(["study", kind, str(path), *rest])


def trained(said: str) -> list[str]:
    return [line.partition(":")[0] for line in said.splitlines() if ": training, " in line]


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return {row["trial"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_a_study_is_run_once_and_its_results_outlive_its_runs(
    tmp_path: Path, prepared_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, folder = write_study(tmp_path, prepared_folder), tmp_path / "study"
    assert study("run", path) == 0
    said = capfd.readouterr().err
    assert trained(said) == ["ar-66", "first-66", "base-66", "loc-66", "loc-67"] or trained(
        said
    ) == ["first-66", "ar-66", "base-66", "loc-66", "loc-67"]
    assert "5 of 5 runs are measured" in said
    results = {f"{row['trial']}-{row['seed']}": row for row in read_log(folder / "results.jsonl")}
    assert sorted(results) == ["ar-66", "base-66", "first-66", "loc-66", "loc-67"]
    for name, row in results.items():
        (inspection,) = [*(folder / name).glob("inspection*")] or [None]
        assert (inspection is None) == (row["trial"] == "ar")
        if inspection is not None:
            found = json.loads((inspection / "inspection.json").read_text())["figures"]
            assert {key: row["figures"][key] for key in found} == found
        compared = [
            line for line in read_log(folder / name / "metrics.jsonl") if "eflops_model" not in line
        ]
        compared = [line for line in compared if "comparison_conditions" in line]
        assert len(compared) == (0 if row["trial"] == "first" else 2)
        for by, line in zip(COMPARISONS, compared):
            for key in ("judge_nats_per_byte", "distinct_4word_share"):
                assert row["figures"][f"comparison/{by}/{key}"] == line[f"comparison/{key}"]
        summary = json.loads((folder / name / "summary.json").read_text())
        assert row["cost"]["cpu_seconds"] == summary["cpu_seconds"] > 0
        assert row["cost"]["tokens"] == 2 * 4 * 32

    table = rows_of(folder / "table.csv")
    assert [*table] == ["base", "loc", "ar", "first"]

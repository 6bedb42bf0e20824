"""The table of runs, against runs whose files are written by hand."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cola_train.cli import main
from cola_train.config.load import to_yaml
from cola_train.config.run import RunConfig
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.run_folder import Status, locked, write_status
from cola_train.run_layout import folder_of


@pytest.fixture
def runs(
    vae_config: Callable[..., VAERunConfig],
    joint_config: Callable[..., JointRunConfig],
    tmp_path: Path,
) -> Path:
    def make(config: RunConfig, status: Status | None, *lines: dict[str, float | None]) -> None:
        folder = folder_of(config)
        folder.mkdir()
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        if status is not None:
            write_status(folder, status)
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / "metrics.jsonl").write_text(text + '{"step": 99, "train/lo')
        for path in folder.iterdir():
            os.utime(path, (10**9, 10**9))

    logged = {"train/loss": 2.5, "eflops_paper": 1.0, "eflops_model": 3e-7}
    make(vae_config("a-done"), Status("finished", 6), {"step": 6, **logged}, {"step": 6, "x/y": 1})
    make(
        joint_config("b-dead", "budget.convention=paper"),
        Status("running", 10),
        {"step": 20, **logged},
        {"step": 30, **logged, "train/loss": None},
    )
    make(vae_config("c-new"), None)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("a: [")
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_a_log_of_other_kinds_of_values_is_shown_all_the_same(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"step": "x", "train/loss": "low", "eflops_model": [1]}
    (runs / "a-done" / "metrics.jsonl").write_text(json.dumps(line) + "\n[1]\nnull\n")
    (runs / "a-done" / "status.json").write_text('{"state": "running", "step": 3}')
    assert main(["runs", str(runs / "a-done")]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[:6] == ["a-done", "vae", "died", "3", "-", "-"]


def test_each_run_as_it_stands(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with locked(runs / "c-new"):
        assert main(["runs", str(runs), "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    columns = ("verb", "state", "step", "loss", "eflops")
    assert {name: tuple(row[key] for key in columns) for name, row in found.items()} == {
        "a-done": ("vae", "finished", 6, 2.5, 3e-7),
        "b-dead": ("joint", "died", 30, None, 1.0),
        "broken": (None, "not begun", 0, None, None),
        "c-new": ("vae", "running", 0, None, None),
    }
    assert found["a-done"]["changed"].startswith("2001-09-0")
    assert "gone without a word" in found["b-dead"]["reason"]


def test_the_table_is_for_people(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    heading, done, *_ = capsys.readouterr().out.splitlines()
    assert heading.split() == ["name", "verb", "state", "step", "loss", "EFLOPs", "last", "change"]
    assert done.split()[:6] == ["a-done", "vae", "finished", "6", "2.5000", "3e-07"]
    assert main(["runs", str(runs / "b-dead")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["runs", str(runs / "notes")]) == 0
    assert "There are no runs in" in capsys.readouterr().err
    assert main(["runs", str(runs / "nowhere")]) == 2
    assert "There is no folder" in capsys.readouterr().err


_NO_TORCH = """
import sys
from cola_train.cli import main
try:
    main(sys.argv[1:])
finally:
    assert "torch" not in sys.modules
    import matplotlib
"""


@pytest.mark.parametrize("verb", ["runs", "--version"])
def test_neither_the_table_nor_the_version_imports_torch_or_a_notebooks_backend(
    tmp_path: Path, verb: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _NO_TORCH, verb, *([str(tmp_path)] if verb == "runs" else [])],
        env={**os.environ, "MPLBACKEND": "module://nowhere.backend_inline"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if verb == "--version":
        import torch

        assert done.stdout.endswith(f", torch {torch.__version__}\n")

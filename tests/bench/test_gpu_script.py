"""scripts/bench_gpu.sh: its own commands, recorded, are ones that the program takes."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cola_train.bench.config import BenchSampleConfig, BenchTrainConfig, split_settings
from cola_train.bench.workloads import run_config
from cola_train.cli import make_parser
from cola_train.config.data import PrepareConfig, TokenizerTrainConfig
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.families.costs import network_parameters
from cola_train.families.registry import families, load_run_config
from tests.helpers.programs import ROOT, clean_environment

# Notes its arguments; leaves the file that the script then reads.
_RECORDER = """#!{python}
import json, pathlib, sys
with open({log!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for text in sys.argv[1:]:
    if text.startswith("out=") and text.endswith(".json"):
        pathlib.Path(text[4:]).write_text('{{"seconds": {{"median": 0.5}}}}')
"""


@pytest.fixture
def record(tmp_path: Path) -> list[list[str]]:
    """The commands that the script runs with its defaults."""
    log, programs = tmp_path / "log.jsonl", tmp_path / "programs"
    programs.mkdir()
    program = programs / "cola-train"
    program.write_text(_RECORDER.format(python=sys.executable, log=str(log)), encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {
        **clean_environment(),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "JOINT_MINUTES": "2",
    }
    command = ["bash", "scripts/bench_gpu.sh", "my texts/*.txt", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def test_the_scripts_commands_are_whole_and_in_order(
    record: list[list[str]], tmp_path: Path
) -> None:
    verbs = [
        " ".join(command[:2]) if command[0] in ("bench", "tokenizer") else command[0]
        for command in record
    ]
    assert verbs == [
        "bench train",
        "bench train",
        "bench sample",
        "bench sample",
        "tokenizer train",
        "prepare",
        "bench train",
        "vae",
        "bench train",
        "joint",
        "inspect",
        "sample",
    ]
    runs: dict[str, RunConfig] = {}
    for command in record:
        if command[:2] == ["bench", "train"]:
            own, of_run = split_settings(command[2:])
            run_config(load_config(BenchTrainConfig, None, own), of_run)
        elif command[:2] == ["bench", "sample"]:
            load_config(BenchSampleConfig, None, [text for text in command[2:] if "=" in text])
        elif command[:2] == ["tokenizer", "train"]:
            load_config(TokenizerTrainConfig, None, command[2:])
        elif command[0] == "prepare":
            assert load_config(PrepareConfig, None, command[1:]).corpus.inputs == ["my texts/*.txt"]
        elif command[0] in families():
            runs[command[0]] = load_run_config(ROOT / command[1], command[2:])
        elif command[0] == "inspect":
            assert make_parser().parse_args(command).reference == tmp_path / "out" / "vae"
    # Half a second a step: ten minutes of stage 1, two of stage 2.
    assert {stage: run.trainer.max_steps for stage, run in runs.items()} == {
        "vae": 1200,
        "joint": 240,
    }
    assert all(
        run.runs_folder == str(tmp_path / "out") and run.optim.decay == str(run.trainer.max_steps)
        for run in runs.values()
    )
    assert 50e6 < sum(network_parameters(runs["joint"]).values()) < 150e6
    assert record[2][-1].endswith("sample-1.json")
    assert record[3][-1].endswith("sample-64.json")


def test_both_runs_configs_inherit_the_papers_base() -> None:
    for stage in ("vae", "joint"):
        path = ROOT / "configs" / "small" / f"bench_{stage}.yaml"
        assert path.read_text(encoding="utf-8").startswith(
            f"# cola-train {stage} configs/small/bench_{stage}.yaml\n"
        )
        config = load_run_config(path)
        assert (config.name, config.seed, config.data.seq_len) == (f"bench_{stage}", 66, 512)

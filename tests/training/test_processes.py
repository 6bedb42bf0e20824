"""Two processes over gloo train to the numbers of one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cola_train.config.load import to_yaml
from cola_train.config.runs import JointRunConfig
from cola_train.hf_format import Checkpoint
from tests.helpers.programs import clean_environment


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")} for line in lines]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(joint_config: Callable[..., JointRunConfig], tmp_path: Path) -> None:
    # Prompt blocks give rows different numbers of counted positions: means of means would differ from the mean.
    shared = ["trainer.micro_batch_size=2", "objective.flow.prompt_block_prob=0.5"]
    runs = []
    for processes in (1, 2):
        config = joint_config(f"run{processes}", *shared, f"parallel.num_processes={processes}")
        (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "cola_train", "joint", str(tmp_path / "config.yaml")],
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        run = tmp_path / f"run{processes}"
        # gloo may abort a process after all is done; what counts is what the run left.
        assert (run / "hf" / "cola_dlm").is_dir(), done.stderr[-3000:]
        runs.append(run)
    one, two = metrics(runs[0]), metrics(runs[1])
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    assert Checkpoint.load(runs[1]).dit is not None

"""A family that the package does not know (tests/third_party), found by its entry point, goes
through every verb.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_train.families import registry
from cola_train.families.registry import families, family_named, register_family
from cola_train.run_folder import read_run_config
from cola_train.training.checkpoints.folder import intact_manifest, latest_checkpoint
from tests.helpers.benchmarks import make_samples, write_samples
from tests.helpers.programs import clean_environment, cola_train
from tests.helpers.runs import figures, saved_tensors

THIRD_PARTY = Path(__file__).resolve().parents[1] / "third_party"
Run = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = """
stage: bigram
data: {{path: {data}, seq_len: 32}}
table: {{vocab_size: 320}}
optim: {{learning_rate: 3.0e-2, warmup: "2", decay: "400"}}
trainer: {{global_batch_size: 8, micro_batch_size: 4, precision: fp32, accelerator: cpu,
          validation_rows: 5, log_every_steps: 1, validate_every_steps: 20, max_steps: 60}}
checkpoint: {{every_steps: 10}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, prepared_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("third_party")
    (folder / "bigram.yaml").write_text(CONFIG.format(data=prepared_folder))
    (folder / "curve.yaml").write_text(
        "folder: curve\nfamilies: {bigram: {config: bigram.yaml, sizes: {s: "
        "[table.rank=2]}}}\nbudgets: [1.0e-10]\nschedule: cosine\ncomparison: {num_openings: 4, "
        "num_new_tokens: 4}\nsettings: [trainer.validate_every_steps=0]\n"
    )
    return folder


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cola_train", *arguments]


def environment() -> dict[str, str]:
    found = clean_environment()
    return {**found, "PYTHONPATH": os.pathsep.join([found.get("PYTHONPATH", ""), str(THIRD_PARTY)])}


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = cola_train(*arguments, cwd=folder, python_path=THIRD_PARTY)
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(scope="module")
def trained(folder: Path, run: Run) -> Path:
    """A run that was killed once it had saved, and gone on with; and beside it one that was not."""
    killed = subprocess.Popen(
        command("bigram", "bigram.yaml", "name=killed", "trainer.max_steps=100000"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 120
    while not list(folder.glob("checkpoints/killed/lightning/step-*")):
        assert time.monotonic() < until
        assert killed.poll() is None
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    saved = latest_checkpoint(folder / "checkpoints/killed")
    assert saved is not None
    begun = intact_manifest(saved).step
    run("bigram", "bigram.yaml", "name=killed", f"trainer.max_steps={begun + 20}")
    run("bigram", "bigram.yaml", "name=whole", f"trainer.max_steps={begun + 20}")
    return folder / "checkpoints"


@pytest.mark.slow
def test_it_learns_and_goes_on_after_a_kill_to_the_bit(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, whole = saved_tensors(trained / "killed"), saved_tensors(trained / "whole")
    assert killed.keys() == whole.keys()
    assert len(killed) == 8  # two weights, and of each what AdamW keeps
    assert all(torch.equal(killed[name], whole[name]) for name in killed)
    found = figures(trained / "whole")
    assert found == figures(trained / "killed")
    losses = [
        value for (_, name), value in sorted(found.items()) if name == "train/bigram_nats_per_token"
    ]
    assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
    # This process has not looked for entry points there yet.
    monkeypatch.setattr(registry, "_known", {})
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    assert read_run_config(trained / "whole").table.rank == 8


@pytest.mark.slow
def test_its_checkpoints_are_written_read_sampled_and_judged(
    trained: Path, run: Run, folder: Path
) -> None:
    run("export", "checkpoints/whole", "--out", "exported")
    assert (folder / "exported/bigram.json").is_file()
    sampled = [
        run("sample", place, "--prompt", "It was", "max_new_tokens=6").stdout
        for place in ("exported", "checkpoints/killed")
    ]
    assert sampled[0] == sampled[1]
    assert "[length, 6 tokens]" in sampled[0]
    compared = run("compare", "checkpoints/whole", "num_openings=4", "num_new_tokens=4").stdout
    assert "judge_nats_per_token" in compared
    assert "exact" in run("likelihood", "exported", "--texts", write_text(folder)).stdout
    write_samples(folder / "benchmarks", "obqa", make_samples("obqa", 3))
    run(
        "evaluate",
        "checkpoints/whole",
        "--data",
        "benchmarks",
        "--tasks",
        "obqa",
        "sampler.max_new_tokens=4",
    )
    identity = json.loads((trained / "whole/benchmarks/evaluation.json").read_text())
    assert identity["checkpoint"]["family"] == "bigram"
    assert run("audit", "checkpoints/killed").stdout.rstrip().splitlines()[-1].startswith("CLEAN")


@pytest.mark.slow
def test_it_is_planned_and_drawn_into_a_curve(run: Run, folder: Path, trained: Path) -> None:
    plan = json.loads(run("plan", "bigram.yaml", "name=planned", "--devices", "1", "--json").stdout)
    # Per predicted token the head's product, forward and both gradients; 31 of 32 tokens predict.
    assert plan["step_flops"]["model"] == 8 * 31 * 6 * 8 * 320
    assert plan["parameters"]["backbone"] == 2 * 8 * 320
    run("curve", "run", "curve.yaml")
    header, point = (folder / "curve/points.csv").read_text().splitlines()
    assert dict(zip(header.split(","), point.split(","), strict=True))["parameters"] == str(
        2 * 2 * 320
    )


def write_text(folder: Path) -> str:
    (folder / "texts.jsonl").write_text('{"text": "It was a truth"}\n')
    return "texts.jsonl"


def test_a_family_is_registered_by_a_call_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_known", {})
    monkeypatch.setattr(registry, "_registered", {})
    assert "bigram" not in families()
    # Entry points have been looked for: from here on it can be imported, and nothing more.
    monkeypatch.syspath_prepend(str(THIRD_PARTY))
    from bigram.family import BigramFamily

    family = BigramFamily()
    register_family(family)
    assert family_named("bigram") is family
    assert list(families()) == ["vae", "joint", "distill", "ar", "llada", "bigram"]

    class Impostor(BigramFamily):
        name = "joint"

    with pytest.raises(
        ValueError, match="There is a family 'joint' already: give yours another name"
    ):
        register_family(Impostor())

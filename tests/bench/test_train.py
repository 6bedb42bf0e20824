"""`bench train` on a tiny run: every figure against what it is said to be."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cola_train.bench.config import BenchTrainConfig
from cola_train.bench.machine import Clock
from cola_train.bench.train import measure_train
from cola_train.bench.workloads import run_config
from cola_train.config.settings import UserError
from cola_train.families.costs import step_flops

PARTS = {
    "encode",
    "forward of the DiT",
    "losses",
    "backward",
    "clip",
    "optimizer",
    "the rest",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of S, with rows so short that it takes a moment."""
    clip = torch.nn.utils.clip_grad_norm_
    config = BenchTrainConfig(
        workload="S", rows=2, micro_batches=2, seq_len=32, warmups=1, runs=3, profile=True
    )
    found = measure_train(config, run_config(config))
    assert torch.nn.utils.clip_grad_norm_ is clip  # nothing that watched is left behind
    return found


def test_rates_follow_from_the_median(result: dict[str, Any]) -> None:
    seconds, rate = result["seconds"]["median"], result["machine"]["matrix_gflops"]["fp32"]
    assert sorted(result["seconds"]["runs"])[1] == seconds
    assert len(result["seconds"]["runs"]) == 3
    assert result["tokens"] == 2 * 2 * 32
    assert result["tokens_per_second"] == pytest.approx(2 * 2 * 32 / seconds)
    assert result["tokens_per_second_per_gflops"] == pytest.approx(
        2 * 2 * 32 / seconds / rate["median"]
    )
    assert min(rate["readings"]) <= rate["median"] <= max(rate["readings"])
    assert len(rate["readings"]) == 2


def test_shares_of_the_peak_are_the_ledgers_flops_over_time_and_measured_rate(
    result: dict[str, Any],
) -> None:
    run = run_config(BenchTrainConfig(workload="S", rows=2, micro_batches=2, seq_len=32))
    assert result["flops"] == step_flops(run, 0)
    peak = result["machine"]["matrix_gflops"]["fp32"]["median"] * 1e9
    for convention, flops in result["flops"].items():
        assert result["mfu"][convention] == pytest.approx(
            flops / result["seconds"]["median"] / peak
        )
    assert result["flops"]["paper"] == 6 * result["parameters"]["dit"] * result["tokens"]


def test_parts_are_named_and_their_shares_are_of_all(result: dict[str, Any]) -> None:
    parts = result["parts"]
    assert set(parts) == PARTS
    assert all(part["seconds"] > 0 for part in parts.values())
    whole = sum(part["seconds"] for part in parts.values())
    assert all(part["share"] == pytest.approx(part["seconds"] / whole) for part in parts.values())


def test_parts_add_up_to_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that reads FLOPs, which no other program on the machine disturbs."""
    config = BenchTrainConfig(workload="S", rows=2, micro_batches=2, seq_len=32, warmups=1, runs=2)
    with FlopCounterMode(display=False) as counter:
        monkeypatch.setattr(Clock, "read", lambda clock: counter.get_total_flops())
        result = measure_train(config, run_config(config))
    flops = {name: part["seconds"] for name, part in result["parts"].items()}
    assert set(flops) == PARTS
    assert sum(flops.values()) == result["seconds"]["min"] == result["seconds"]["max"]
    # The VAE is frozen here. Its encoder and the DiT multiply matrices, in forward and backward.
    assert all(flops[name] == 0 for name in ("losses", "clip", "optimizer", "the rest"))
    assert 0 < flops["encode"] < flops["forward of the DiT"]
    # A product gives two in backward: its weight's gradient and, but for the data, its input's.
    assert 1.9 * flops["forward of the DiT"] < flops["backward"] < 2 * flops["forward of the DiT"]


def test_the_profile_names_the_costliest_operations(result: dict[str, Any]) -> None:
    top = result["top_operations"]
    assert len(top) == 10
    assert [one["seconds"] for one in top] == sorted((one["seconds"] for one in top), reverse=True)
    assert "aten::mm" in {one["operation"] for one in top}
    assert 0.3 < sum(one["share"] for one in top) <= 1


def test_each_run_is_one_step_of_the_training_loop(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's own counter around the loop's steps: what is timed is a step, with all its
    micro-batches.
    """
    from cola_train.training.loop.module import StageModule

    flops = []
    step = StageModule.training_step

    def counted(stage: StageModule, *arguments: Any) -> None:
        with FlopCounterMode(display=False) as counter:
            step(stage, *arguments)
        flops.append(counter.get_total_flops())
        assert stage.state.step == len(flops)

    monkeypatch.setattr(StageModule, "training_step", counted)
    config = BenchTrainConfig(workload=str(tiny_run), rows=2, micro_batches=2, warmups=2, runs=1)
    run = run_config(config)
    result = measure_train(config, run)
    assert len(flops) == 2 + 1 + 2  # warm-ups, runs, and two that are taken apart
    assert set(flops) == {flops[0]}
    assert flops[0] > 0
    assert "decode" in result["parts"]
    assert result["parts"].keys() >= {"encode", "forward of the DiT"}


def test_a_gpu_that_is_not_there_is_refused(tiny_run: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config = BenchTrainConfig(workload=str(tiny_run))
    run = run_config(config)
    run = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, accelerator="gpu"))
    with pytest.raises(UserError, match="torch sees no GPU here; use cpu or auto"):
        measure_train(config, run)

"""`bench sample` on a tiny checkpoint."""

from pathlib import Path

import pytest

from cola_train.bench.config import BenchSampleConfig
from cola_train.bench.sample import measure_sample
from cola_train.config.load import load_config
from cola_train.config.settings import UserError


def test_figures_follow_from_the_median_and_texts_are_whole(tiny_folder: Path) -> None:
    settings = [
        f"workload={tiny_folder}",
        "batch=3",
        "prompt_tokens=6",
        "sampler.max_new_tokens=11",
        "sampler.num_steps=2",
    ]
    result = measure_sample(
        load_config(BenchSampleConfig, None, [*settings, "warmups=1", "runs=3"]), "cpu"
    )
    seconds, rate = (
        result["seconds"]["median"],
        result["machine"]["matrix_gflops"]["fp32"]["median"],
    )
    assert result["tokens_per_second"] == pytest.approx(3 * 11 / seconds)
    assert result["tokens_per_second_per_gflops"] == pytest.approx(3 * 11 / seconds / rate)
    # Blocks of 4: two ids of the prompt are in the first generated one, 13 to fill.
    assert result["blocks"] == 4
    first = result["first_block_seconds"]["median"]
    assert 0 < first < seconds
    assert first + 3 * result["block_seconds"] == pytest.approx(seconds)
    assert result["mfu"]["executed"] == pytest.approx(
        result["flops"]["executed"] / seconds / rate / 1e9
    )
    assert result["flops"]["model"] <= result["flops"]["executed"]
    assert result["memory"]["growth_bytes"] >= 0


def test_a_single_block_has_no_later_ones(tiny_folder: Path) -> None:
    settings = [
        f"workload={tiny_folder}",
        "batch=1",
        "prompt_tokens=4",
        "sampler.max_new_tokens=4",
        "sampler.num_steps=1",
    ]
    result = measure_sample(
        load_config(BenchSampleConfig, None, [*settings, "warmups=1", "runs=1"]), "cpu"
    )
    assert (result["blocks"], result["block_seconds"]) == (1, None)


def test_a_device_that_is_not_there_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="is not usable here"):
        measure_sample(BenchSampleConfig(workload=str(tiny_folder)), "nonsense")

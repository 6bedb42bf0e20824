"""Rates, MFU and what a run has cost, against arithmetic by hand."""

import pytest
import torch

from cola_train.config.settings import UserError
from cola_train.devices import device_peak, matrix_flops, matrix_seconds
from cola_train.peaks import DEVICES, device_named, find_device
from cola_train.run_layout import CLOCKS
from cola_train.training.callbacks.pace import Pace, cost_in_words, summarize_cost
from cola_train.training.loop.state import RunState


def state(step: int) -> RunState:
    return RunState(
        step=step,
        tokens=1000 * step,
        flops={"paper": 5 * step, "model": 40 * step, "executed": 60 * step},
    )


def test_rates_are_of_what_was_done_since_and_without_pauses() -> None:
    pace = Pace(moment=100.0, state=state(10), num_devices=4, peak=50.0, paused=2.0)
    rates = pace.rates(112.0, state(60), last_step=100)
    assert rates == {
        "tokens_per_second": 5000.0,  # 50 steps in 10 seconds
        "tokens_per_second_per_device": 1250.0,
        "eta_seconds": 8.0,
        "mfu": 1.0,  # 200 useful FLOPs a second of 200
        "hfu": 1.5,
    }
    assert rates.keys() <= CLOCKS
    later = pace.since(112.0, state(60))
    assert later.rates(122.0, state(110), last_step=110)["eta_seconds"] == 0.0


def test_without_a_known_peak_there_is_no_mfu() -> None:
    assert "mfu" not in Pace(0.0, state(0), 1, None).rates(1.0, state(1), 2)
    summary = summarize_cost(state(3), None)
    assert summary["mfu"] is None
    assert (
        cost_in_words(summary)
        == "3 steps, 3,000 tokens, EFLOPs 1.8e-16 (executed), 1.2e-16 (model), 1.5e-17 (paper), 0 "
        "device-hours"
    )


def test_a_summary_is_over_all_devices_and_the_whole_time() -> None:
    done = state(30)
    done.seconds, done.device_seconds, done.cpu_seconds = 10.0, 40.0, 72.5
    summary = summarize_cost(done, 60.0)
    assert (summary["mfu"], summary["hfu"]) == (1200 / 2400, 1800 / 2400)
    assert summary["tokens_per_second"] == 3000.0
    assert summary["cpu_seconds"] == 72.5
    assert summary["device_hours"] == pytest.approx(40 / 3600, abs=1e-6)
    assert cost_in_words(summary).endswith("MFU 50.0%, HFU 75.0%")


def test_a_state_is_not_another_for_having_taken_longer() -> None:
    slow = state(3)
    slow.seconds = 1e6
    assert slow == state(3) == RunState.from_json(slow.to_json())
    assert RunState.from_json(slow.to_json()).seconds == 1e6


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_devices_are_known_by_their_drivers_names(name: str, expected: str | None) -> None:
    assert find_device(name) == (None if expected is None else DEVICES[expected])


def test_a_device_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(
        UserError, match="no device 'H10' in the table of peaks; did you mean 'H100'"
    ):
        device_named("H10")


def test_a_cpus_peak_is_measured_and_beyond_what_small_products_reach() -> None:
    cpu = torch.device("cpu")
    peak = device_peak(cpu, "fp32")
    assert peak is not None
    assert 1e9 < peak < 1e14
    assert matrix_flops(cpu) / min(matrix_seconds(cpu, torch.float32)) == pytest.approx(
        peak, rel=0.9
    )

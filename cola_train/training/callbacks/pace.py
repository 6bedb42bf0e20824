"""How fast a run goes (tokens per second, MFU, HFU, time left) and what it has cost so far."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from cola_train.console import only_warned
from cola_train.files import write_atomically
from cola_train.run_layout import SUMMARY
from cola_train.training.loop.budget import eflops
from cola_train.training.loop.state import RunState


@dataclasses.dataclass(frozen=True)
class Pace:
    """A moment of a run, to measure from."""

    moment: float  # reading of the monotonic clock, seconds
    state: RunState  # as it was then
    num_devices: int
    peak: float | None  # FLOPs per second of one device; None where it is not known
    paused: float = 0.0  # seconds since then that were not training

    def since(self, now: float, state: RunState) -> "Pace":
        """The same run, to be measured from `now` on."""
        return Pace(now, copy.deepcopy(state), self.num_devices, self.peak)

    def rates(self, now: float, state: RunState, last_step: int) -> dict[str, float]:
        """What a line of metrics.jsonl says of the speed since this moment.

        MFU is useful FLOPs (convention `model`) per second over the devices' peak, HFU executed
        ones. `eta_seconds` is the time to `last_step` at this pace.
        """
        seconds = max(now - self.moment - self.paused, 1e-9)
        tokens, steps = state.tokens - self.state.tokens, state.step - self.state.step
        found = {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / self.num_devices,
            "eta_seconds": (last_step - state.step) * seconds / max(steps, 1),
        }
        if self.peak is not None:
            for name, convention in (("mfu", "model"), ("hfu", "executed")):
                done = state.flops.get(convention, 0) - self.state.flops.get(convention, 0)
                found[name] = done / seconds / (self.peak * self.num_devices)
        return found


def summarize_cost(state: RunState, peak: float | None) -> dict[str, Any]:
    """summary.json: what a run has cost over all attempts; rates are over its whole time."""

    def utilization(convention: str) -> float | None:
        if peak is None or state.device_seconds <= 0:
            return None
        return state.flops.get(convention, 0) / (peak * state.device_seconds)

    return {
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "tokens": state.tokens,
        "eflops": eflops(state),
        "seconds": round(state.seconds, 3),
        "cpu_seconds": round(state.cpu_seconds, 3),
        "device_hours": round(state.device_seconds / 3600, 6),
        "tokens_per_second": state.tokens / state.seconds if state.seconds else None,
        "mfu": utilization("model"),
        "hfu": utilization("executed"),
    }


def write_summary(run_folder: Path, state: RunState, peak: float | None) -> None:
    """Write summary.json; a disk that refuses it is not worth a run, but is told."""
    with only_warned("the run's cost could not be written"):
        content = json.dumps(summarize_cost(state, peak), indent=1) + "\n"
        write_atomically(run_folder / SUMMARY, content)


def cost_in_words(summary: dict[str, Any]) -> str:
    """A summary in one line."""
    spent = ", ".join(f"{value:.6g} ({name})" for name, value in summary["eflops"].items())
    text = (
        f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, EFLOPs {spent}, "
        f"{summary['device_hours']:.4g} device-hours"
    )
    if summary["mfu"] is None:
        return text
    return f"{text}, MFU {summary['mfu']:.1%}, HFU {summary['hfu']:.1%}"

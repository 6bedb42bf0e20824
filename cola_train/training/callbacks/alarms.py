"""Alarms: a run says, once an episode, that its latents collapse or drift or that its loss jumps.

It continues, unless `alarms.stop`. The guard (guard.py) keeps bad steps from the weights; an alarm
only tells, also of a step that the guard skipped. What it remembers is part of the run's state, so
a resumed run neither forgets an episode nor raises it again.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_train.config.loop import AlarmsConfig
from cola_train.config.run import RunConfig
from cola_train.console import say
from cola_train.families.registry import family_of
from cola_train.json_lines import JsonlWriter
from cola_train.run_layout import ALARM_LOG
from cola_train.training.callbacks.validation import Report
from cola_train.training.loop.guard import UsualLoss
from cola_train.training.loop.module import StageCallback, StageModule

COLLAPSE, INACTIVE = "posterior_collapse", "inactive_units"
DRIFT, SPIKE = "latent_drift", "loss_spike"

_ADVICE = {
    COLLAPSE: (
        "the latents are mostly noise. Lower objective.kl_weight (stage 2: "
        "objective.entropy_weight), or hold objective.fixed_log_snr, in a new run"
    ),
    INACTIVE: (
        "channels no longer depend on the text. Lower objective.kl_weight; in stage 2 lower "
        "objective.flow_weight or set objective.flow.grad_to_encoder=false, in a new run"
    ),
    DRIFT: (
        "the encoder leaves the one that stage 2 began with. Raise objective.reference_weight or "
        "lower objective.vae_strategy.learning_rate_factor, in a new run"
    ),
    SPIKE: (
        "look at gradient_norm and at what this step read (steps.jsonl); if it stays, lower "
        "optim.learning_rate in a new run, or let the guard skip such steps "
        "(guard.spike_deviations)"
    ),
}


@dataclasses.dataclass(frozen=True)
class Signal:
    """What an alarm looks at after a step; it raises the alarm where it is beyond the limit."""

    name: str
    metric: str
    value: float
    limit: float
    setting: str
    beyond: bool  # the limit, on the side that is bad
    raise_after: int  # times in a row
    clear_after: int

    def text(self, step: int) -> str:
        """That the alarm was raised by it, or is over, in one line for people."""
        seen = f"{self.name.replace('_', ' ')}: {self.metric} = {self.value:.5g}"
        if not self.beyond:
            return f"alarm over at step {step}: {seen}, back within {self.limit:.5g}"
        side = "above" if self.value > self.limit else "below"
        times = f" {self.raise_after} times in a row" if self.raise_after > 1 else ""
        return (
            f"ALARM at step {step}: {seen}, {side} {self.limit:.5g} "
            f"(alarms.{self.setting}){times}: {_ADVICE[self.name]}."
        )


@dataclasses.dataclass
class Episode:
    """Whether one alarm is on, and how many times in a row the signal was on the other side."""

    raised: bool = False
    in_a_row: int = 0

    def see(self, signal: Signal) -> bool:
        """Take in a signal; returns whether it raised or cleared the alarm."""
        if signal.beyond == self.raised:
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        if self.in_a_row < (signal.raise_after if signal.beyond else signal.clear_after):
            return False
        self.raised, self.in_a_row = signal.beyond, 0
        return True


@dataclasses.dataclass
class Memory:
    """What alarms know of earlier steps; the same on every process."""

    episodes: dict[str, Episode] = dataclasses.field(default_factory=dict)
    log_snr_was_above: bool = False

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Memory":
        """The inverse of `dataclasses.asdict`; an empty mapping gives an empty memory."""
        episodes = {name: Episode(**one) for name, one in values.get("episodes", {}).items()}
        return cls(episodes, values.get("log_snr_was_above", False))

    def see(
        self,
        config: AlarmsConfig,
        metrics: Mapping[str, float],
        past_start: bool,
        usual: UsualLoss | None = None,
    ) -> list[Signal]:
        """Take in metrics of a step or an inspection; returns what raised or cleared an alarm.

        They are those of all processes; one absent or not finite changes no alarm. `past_start`: a
        low logSNR means something; a fresh VAE's is low in health too. `usual` is what the loss was
        compared with; None while too few losses are known.
        """
        patience = (config.raise_after, config.clear_after)
        watched = (
            (COLLAPSE, "vae_log_snr", "min_log_snr", patience),
            (INACTIVE, "active_units_share", "min_active_units", (1, 1)),
            (DRIFT, "reference_kl_nats_per_token", "max_reference_kl", patience),
            (SPIKE, "loss", "spike_deviations", (1, config.clear_after)),
        )
        changes = []
        for name, metric, setting, (raise_after, clear_after) in watched:
            value, limit = metrics.get(metric, math.nan), getattr(config, setting)
            if name == SPIKE and limit is not None:
                limit = None if usual is None else usual.limit(limit)
            if limit is None or not math.isfinite(value):
                continue
            beyond = value < limit if setting.startswith("min_") else value > limit
            if name == COLLAPSE:
                self.log_snr_was_above = self.log_snr_was_above or not beyond
                if not past_start and not self.log_snr_was_above:
                    continue
            signal = Signal(name, metric, value, limit, setting, beyond, raise_after, clear_after)
            if self.episodes.setdefault(name, Episode()).see(signal):
                changes.append(signal)
        return changes


class Alarms(StageCallback):
    """Looks at the metrics of each step, and of an inspection; says and logs what changes.

    Comes before the callback that saves: what is remembered is saved with the step, and so is the
    step that stops the run. All processes see the same metrics and decide alike.
    """

    def __init__(self, config: RunConfig, run_folder: Path, is_first: bool, report: Report) -> None:
        self.config, self.is_first, self.report = family_of(config).alarms(config), is_first, report
        self.lines = JsonlWriter(run_folder / ALARM_LOG)
        self.stopped_by: str | None = None  # the text of the alarm that stops the run
        self._inspected: dict[str, float] = {}

    def see_inspection(self, metrics: Mapping[str, float]) -> None:
        """Take note of an inspection of the step that was just done; on every process alike."""
        # Training itself gives the other metrics at every step: one more look would count twice.
        self._inspected = {
            name: value for name, value in metrics.items() if name == "active_units_share"
        }

    def after_step(self, stage: StageModule) -> None:
        state, metrics = stage.state, stage.last_metrics
        memory = Memory.from_plain(state.alarms)
        past_start = state.step > stage.schedule.warmup_steps or _kl_outweighs_reconstruction(
            metrics, stage.last_weights
        )
        changes = memory.see(self.config, metrics, past_start, stage.last_usual_loss)
        changes += memory.see(self.config, self._inspected, past_start)
        self._inspected = {}
        state.alarms = dataclasses.asdict(memory)
        for signal in changes:
            if self.is_first:
                self._tell(signal, state.step)
            if signal.beyond and self.config.stop:
                self.stopped_by = self.stopped_by or signal.text(state.step)
                stage.stop_requested = True

    def _tell(self, signal: Signal, step: int) -> None:
        text = signal.text(step)
        say(f"cola-train: {text}")
        seen = {"figure": signal.metric, "value": signal.value, "limit": signal.limit}
        row = {"step": step, "alarm": signal.name, "raised": signal.beyond, **seen, "text": text}
        self.lines.append(row)
        self.report(step, {f"alarm/{signal.name}": float(signal.beyond)}, time.monotonic())


def _kl_outweighs_reconstruction(
    metrics: Mapping[str, float], weights: Mapping[str, float]
) -> bool:
    """Whether noise is worth more to the loss than text: no warm-up will then lift the logSNR."""
    kl = metrics.get("kl_nats_per_token", 0.0)
    reconstruction = metrics.get("reconstruction_nats_per_token", math.inf)
    return weights.get("kl_nats_per_token", 0.0) * kl > reconstruction

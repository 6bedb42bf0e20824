"""Alarms: a run says, once an episode, that its latents collapse or drift or that its loss jumps;
it goes on unless told to stop.

The guard (guard.py) keeps bad steps from the weights; an alarm only tells, of a step that the guard
skipped too. What it remembers is part of the run's state, so a resumed run neither forgets an
episode nor raises it again.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cola_train.config.alarms import AlarmsConfig
from cola_train.config.run import RunConfig
from cola_train.console import say
from cola_train.families.registry import family_of
from cola_train.files import JsonlWriter
from cola_train.run_layout import ALARM_LOG
from cola_train.training.callbacks.validation import Report
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.spikes import UsualLoss

COLLAPSE, INACTIVE, DRIFT, SPIKE = (
    "posterior_collapse",
    "inactive_units",
    "latent_drift",
    "loss_spike",
)

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
    """What an alarm looks at after a step."""

    name: str
    figure: str
    value: float
    limit: float
    setting: str
    beyond: bool
    raise_after: int  # times in a row
    clear_after: int


@dataclasses.dataclass(frozen=True)
class Change:
    """An alarm that was raised, or is over."""

    signal: Signal
    raised: bool

    def text(self, step: int) -> str:
        """One line for people."""
        signal, name = self.signal, self.signal.name.replace("_", " ")
        if not self.raised:
            return (
                f"alarm over at step {step}: {name}: {signal.figure} = {signal.value:.5g}, back "
                f"within {signal.limit:.5g}"
            )
        side = "above" if signal.value > signal.limit else "below"
        times = f" {signal.raise_after} times in a row" if signal.raise_after > 1 else ""
        return (
            f"ALARM at step {step}: {name}: {signal.figure} = {signal.value:.5g}, {side} "
            f"{signal.limit:.5g} (alarms.{signal.setting}){times}: {_ADVICE[signal.name]}."
        )


@dataclasses.dataclass
class Episode:
    """One alarm: whether it is on, and how many times in a row the other was seen."""

    raised: bool = False
    in_a_row: int = 0

    def see(self, signal: Signal) -> Change | None:
        """Take in a signal; returns what it changed."""
        if signal.beyond == self.raised:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        if self.in_a_row < (signal.raise_after if signal.beyond else signal.clear_after):
            return None
        self.raised, self.in_a_row = signal.beyond, 0
        return Change(signal, self.raised)


@dataclasses.dataclass
class Memory:
    """What alarms know of earlier steps; the same on every process."""

    episodes: dict[str, Episode] = dataclasses.field(default_factory=dict)
    log_snr_was_above: bool = False

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Memory":
        """The inverse of `dataclasses.asdict`; nothing is a memory of nothing."""
        episodes = {
            name: Episode(**episode) for name, episode in values.get("episodes", {}).items()
        }
        return cls(episodes, values.get("log_snr_was_above", False))

    def see(
        self,
        config: AlarmsConfig,
        figures: Mapping[str, float],
        past_start: bool,
        usual: UsualLoss | None = None,
    ) -> list[Change]:
        """Take in figures of a step, or of an inspection; those that are absent or not finite leave
        an alarm as it is.

        Args:
            config: the thresholds.
            figures: global ones, by the names that training and `Inspection.figures` give them.
            past_start: whether a low logSNR means anything. A fresh VAE's is low in health too.
            usual: what the loss was compared with; None while too few losses are known.
        """
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        signals = [
            *self._of_latents(config, figures, past_start),
            *_of_loss(config, figures, usual),
        ]
        changes = [
            self.episodes.setdefault(signal.name, Episode()).see(signal) for signal in signals
        ]
        return [change for change in changes if change is not None]

    def _of_latents(
        self, config: AlarmsConfig, figures: Mapping[str, float], past_start: bool
    ) -> list[Signal]:
        found = []
        log_snr, least = figures.get("vae_log_snr"), config.min_log_snr
        if log_snr is not None and least is not None:
            self.log_snr_was_above = self.log_snr_was_above or log_snr >= least
            if past_start or self.log_snr_was_above:
                patience = (config.raise_after, config.clear_after)
                found.append(
                    Signal(
                        COLLAPSE,
                        "vae_log_snr",
                        log_snr,
                        least,
                        "min_log_snr",
                        log_snr < least,
                        *patience,
                    )
                )
        share, least = figures.get("active_units_share"), config.min_active_units
        if share is not None and least is not None:
            found.append(
                Signal(
                    INACTIVE,
                    "active_units_share",
                    share,
                    least,
                    "min_active_units",
                    share < least,
                    1,
                    1,
                )
            )
        drift, most = figures.get("reference_kl_nats_per_token"), config.max_reference_kl
        if drift is not None and most is not None:
            patience = (config.raise_after, config.clear_after)
            found.append(
                Signal(
                    DRIFT,
                    "reference_kl_nats_per_token",
                    drift,
                    most,
                    "max_reference_kl",
                    drift > most,
                    *patience,
                )
            )
        return found


def _of_loss(
    config: AlarmsConfig, figures: Mapping[str, float], usual: UsualLoss | None
) -> list[Signal]:
    loss, deviations = figures.get("loss"), config.spike_deviations
    if loss is None or deviations is None or usual is None:
        return []
    limit = usual.limit(deviations)
    return [
        Signal(SPIKE, "loss", loss, limit, "spike_deviations", loss > limit, 1, config.clear_after)
    ]


class Alarms(pl.Callback):
    """Looks at every step's figures, and at an inspection's when there is one; says changes, and
    logs them.

    Comes before the callback that saves: what is remembered is saved with the step, and so is the
    step that stops the run. All processes see the same figures and decide alike.

    Attributes:
        stopped_by: the alarm that stops the run, if one does.
    """

    def __init__(self, config: RunConfig, run_folder: Path, is_first: bool, report: Report) -> None:
        self.config, self.is_first, self.report = (
            family_of(config).alarms(config),
            is_first,
            report,
        )
        self.lines = JsonlWriter(run_folder / ALARM_LOG)
        self.stopped_by: str | None = None
        self._inspected: dict[str, float] = {}

    def see_inspection(self, figures: Mapping[str, float]) -> None:
        """Take note of `Inspection.figures` of the step that was just done, on every process
        alike.
        """
        # Of what training itself gives at every step one more look would count twice.
        self._inspected = {
            name: value for name, value in figures.items() if name == "active_units_share"
        }

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        """A batch is an optimizer step."""
        assert isinstance(pl_module, StageModule)
        self.look(pl_module)

    def look(self, module: StageModule) -> None:
        """Take in the step that was just done."""
        state = module.state
        memory = Memory.from_plain(state.alarms)
        figures = module.last_metrics
        past_start = state.step > module.schedule.warmup_steps or _kl_outweighs_reconstruction(
            figures, module.last_weights
        )
        changes = memory.see(self.config, figures, past_start, module.last_usual_loss)
        changes += memory.see(self.config, self._inspected, past_start)
        self._inspected = {}
        state.alarms = dataclasses.asdict(memory)
        for change in changes:
            self._tell(change, state.step)
            if change.raised and self.config.stop:
                self.stopped_by = self.stopped_by or change.text(state.step)
                module.stop_requested = True

    def _tell(self, change: Change, step: int) -> None:
        if not self.is_first:
            return
        signal, text = change.signal, change.text(step)
        say(f"cola-train: {text}")
        facts = {
            "figure": signal.figure,
            "value": signal.value,
            "limit": signal.limit,
            "text": text,
        }
        self.lines.append({"step": step, "alarm": signal.name, "raised": change.raised, **facts})
        self.report(step, {f"alarm/{signal.name}": float(change.raised)}, time.monotonic())


def _kl_outweighs_reconstruction(
    figures: Mapping[str, float], weights: Mapping[str, float]
) -> bool:
    """Whether nothing will lift the logSNR when the learning rate has warmed up: to the loss, noise
    is worth more than text.
    """
    kl, reconstruction = (
        figures.get("kl_nats_per_token", 0.0),
        figures.get("reconstruction_nats_per_token", math.inf),
    )
    return weights.get("kl_nats_per_token", 0.0) * kl > reconstruction

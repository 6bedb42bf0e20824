"""When an optimizer step is skipped: a loss or gradient that is not finite, or a loss spike.

A loss is a spike, for the guard that skips such a step and the alarm that tells of it, where it is
above

    median + deviations x max(1.4826 MAD, 0.001 |median|)

of the recent losses. MAD is their median absolute deviation from their median, and 1.4826 MAD is
the standard deviation of normal losses. Neither is moved by a few outliers, as a mean and a
standard deviation are: one spike in the window would hide the next. The floor keeps a plateau,
where MAD is next to 0, from making a spike of every ripple.

The recent losses are those of steps that were taken, and of steps alike: phases that train
different terms have different losses.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cola_train.config.loop import GuardConfig
from cola_train.config.settings import UserError
from cola_train.training.loop.state import RunState

_NORMAL_MAD = 1.4826
_LEAST_DEVIATION = 1e-3  # of the median's absolute value


class RunStoppedError(UserError):
    """The guards gave up on a run."""


class UsualLoss(NamedTuple):
    """The level and the spread of recent losses, in the loss's unit."""

    median: float
    deviation: float

    @classmethod
    def of(cls, losses: Sequence[float]) -> "UsualLoss":
        """From at least one loss; all are finite."""
        median = statistics.median(losses)
        spread = _NORMAL_MAD * statistics.median(abs(loss - median) for loss in losses)
        return cls(median, max(spread, _LEAST_DEVIATION * abs(median)))

    def limit(self, deviations: float) -> float:
        """The loss above which a step is a spike."""
        return self.median + deviations * self.deviation


def usual_loss(state: RunState, terms: str, window: int) -> UsualLoss | None:
    """What is usual for a step with these `terms`; None before `window` such steps are known."""
    recent = state.recent_losses.get(terms, [])[-window:]
    return UsualLoss.of(recent) if len(recent) == window else None


def reason_to_skip(
    config: GuardConfig, metrics: Mapping[str, float], usual: UsualLoss | None
) -> str | None:
    """Why the step that gave `metrics`, of all processes, is not to be taken; None to take it."""
    bad = [f"{name} = {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        return f"not finite: {', '.join(bad)}"
    deviations = config.spike_deviations
    if usual is None or deviations is None or metrics["loss"] <= usual.limit(deviations):
        return None
    return (
        f"loss spike: {metrics['loss']:.6g} above {usual.median:.6g} + {deviations:g} x "
        f"{usual.deviation:.3g}"
    )


def count_taken(state: RunState, terms: str, window: int, loss: float) -> None:
    """Record a step that was taken, and its loss among the recent ones."""
    state.skipped_in_a_row = 0
    state.recent_losses[terms] = [*state.recent_losses.get(terms, []), loss][-window:]


def count_skipped(config: GuardConfig, state: RunState, reason: str) -> None:
    """Record that step `state.step` was not taken; a RunStoppedError at one too many in a row."""
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= config.max_skipped_in_a_row:
        raise RunStoppedError(
            f"Optimizer step {state.step} was not taken ({reason}), like the "
            f"{state.skipped_in_a_row - 1} before it; after {config.max_skipped_in_a_row} in a "
            "row (guard.max_skipped_in_a_row) a run stops. Its weights and its last checkpoint "
            "are intact. Look at the metrics before these steps; a lower optim.learning_rate or "
            "trainer.precision=fp32, in a new run that begins from this one (cola-train "
            "warm-start), are the usual remedies."
        )

"""What a loss spike is, for the guard that skips such a step and the alarm that tells of it.

A loss is a spike where it is above

    median + deviations x max(1.4826 MAD, 0.001 |median|)

of the recent losses. MAD is their median absolute deviation from their median, and 1.4826 MAD is
the standard deviation of normal losses. Neither is moved by a few outliers, as a mean and a
standard deviation are: one spike in the window would hide the next. The floor keeps a plateau,
where MAD is next to 0, from making a spike of every ripple.

The recent losses are those of steps that were taken, and of steps alike: phases that train
different terms have different losses.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from cola_train.training.loop.state import RunState

_NORMAL_MAD = 1.4826
_LEAST_DEVIATION = 1e-3  # of the median's absolute value


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


def remember_loss(state: RunState, terms: str, window: int, loss: float) -> None:
    """Add the loss of a step that was taken to the recent ones."""
    state.recent_losses[terms] = [*state.recent_losses.get(terms, []), loss][-window:]

"""When an optimizer step is skipped: a loss or gradient that is not finite, or a loss spike."""

import math
from collections.abc import Mapping

from cola_train.config.loop import GuardConfig
from cola_train.config.settings import UserError
from cola_train.training.loop.spikes import UsualLoss
from cola_train.training.loop.state import RunState


class RunStoppedError(UserError):
    """The guards gave up on a run."""


def reason_to_skip(
    config: GuardConfig, metrics: Mapping[str, float], usual: UsualLoss | None
) -> str | None:
    """Why the step that gave `metrics` is not to be taken; None to take it.

    Args:
        config: what is skipped.
        metrics: of all processes together, so that all decide alike.
        usual: what the loss is compared with (spikes.py); None while too few losses are known.
    """
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


def count_taken(state: RunState) -> None:
    """Record a step that was taken."""
    state.skipped_in_a_row = 0


def count_skipped(config: GuardConfig, state: RunState, reason: str) -> None:
    """Record a step that was not taken; `state.step` is its number, counted from 0.

    Raises:
        RunStoppedError: it was one too many in a row.
    """
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

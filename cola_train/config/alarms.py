"""Settings of the alarms: when a run says that something is wrong with it."""

import dataclasses

from cola_train.config.settings import require, setting


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """When a run says that its latents collapse or drift, or its loss jumps. A threshold of null is
    off.
    """

    min_log_snr: float | None = setting(
        0.5,
        help=(
            "Collapse: the VAE's logSNR stays below this (the paper's lowest is 1.0; a fresh VAE "
            "starts at 0)."
        ),
    )
    min_active_units: float | None = setting(
        0.5,
        help=(
            "Collapse: a smaller share of channels is active, where the run is inspected "
            "(in_loop_eval.evaluators)."
        ),
    )
    max_reference_kl: float | None = setting(
        100.0,
        help=(
            "Drift: KL(q || q_ref) stays above this, nats per token (with 16 channels about 3.5 "
            "sigma in each)."
        ),
    )
    spike_deviations: float | None = setting(
        10.0,
        help=(
            "Spike: the loss exceeds the median of recent ones (guard.spike_window) by this many "
            "robust deviations (1.4826 MAD)."
        ),
    )
    raise_after: int = setting(
        100,
        help=(
            "Steps in a row beyond min_log_snr or max_reference_kl that raise the alarm. Those "
            "below min_log_snr count once it was above, or warm-up is over, or the weighted KL "
            "outweighs reconstruction."
        ),
    )
    clear_after: int = setting(20, help="Steps in a row back in bounds that end it.")
    stop: bool = setting(
        False,
        help="Stop the run at an alarm, with a checkpoint; the same command goes on from it.",
    )

    def __post_init__(self) -> None:
        share = self.min_active_units
        require(
            share is None or 0 < share <= 1,
            f"alarms.min_active_units must be in (0, 1] or null, not {share}.",
        )
        for name in ("max_reference_kl", "spike_deviations"):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"alarms.{name} must be above 0 or null (off), not {value}.",
            )
        for name in ("raise_after", "clear_after"):
            require(
                getattr(self, name) >= 1,
                f"alarms.{name} must be at least 1, not {getattr(self, name)}.",
            )

"""Settings of the alarms: when a run says that something is wrong with it."""

import dataclasses

from cola_train.config.settings import Rule, above_0, at_least, require_each, setting


@dataclasses.dataclass(frozen=True)
class AlarmsConfig:
    """When a run warns of latents that collapse or drift, or a loss that jumps; null is off."""

    min_log_snr: float | None = setting(
        0.5,
        help="Collapse: the VAE's logSNR stays below this (the paper's lowest is 1.0; a fresh VAE "
        "starts at 0).",
    )
    min_active_units: float | None = setting(
        0.5,
        help="Collapse: a smaller share of channels is active, where the run is inspected "
        "(in_loop_eval.evaluators).",
    )
    max_reference_kl: float | None = setting(
        100.0,
        help="Drift: KL(q || q_ref) stays above this, nats per token (with 16 channels about 3.5 "
        "sigma in each).",
    )
    spike_deviations: float | None = setting(
        10.0,
        help="Spike: the loss exceeds the median of recent ones (guard.spike_window) by this many "
        "robust deviations (1.4826 MAD).",
    )
    raise_after: int = setting(
        100,
        help="Steps in a row beyond min_log_snr or max_reference_kl that raise the alarm. Those "
        "below min_log_snr count once it was above, or warm-up is over, or the weighted KL "
        "outweighs reconstruction.",
    )
    clear_after: int = setting(20, help="Steps in a row back in bounds that end it.")
    stop: bool = setting(
        False, help="Stop the run at an alarm, with a checkpoint; the same command resumes it."
    )

    def __post_init__(self) -> None:
        share = Rule("in (0, 1] or null", lambda value: 0 < value <= 1)
        require_each(self, "alarms.", share, "min_active_units")
        deviations = above_0(" or null (off)")
        require_each(self, "alarms.", deviations, "max_reference_kl", "spike_deviations")
        require_each(self, "alarms.", at_least(1), "raise_after", "clear_after")

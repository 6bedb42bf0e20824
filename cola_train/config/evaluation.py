"""Settings of the eight benchmarks."""

import dataclasses
from typing import Literal

from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import at_least, require_each, section, setting


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """`cola-train evaluate`: how benchmarks are answered; by default by the released protocol."""

    sampler: SamplerConfig = section(
        SamplerConfig, help="How answers are generated; batch_size samples at a time."
    )
    num_samples: int | None = setting(
        None, help="Answer so many first samples of each benchmark; null is all.", common=True
    )
    choose_by: Literal["generation", "likelihood", "likelihood_per_token"] = setting(
        "generation",
        help="How a sample with options is answered: generation (the released protocol: text, "
        "which is scored), likelihood (the option that is likeliest after the prompt) or "
        "likelihood_per_token (the same, divided by the option's tokens).",
        common=True,
    )
    likelihood: LikelihoodConfig = section(
        LikelihoodConfig, help="How likelihoods are found, where options are chosen by them."
    )

    def __post_init__(self) -> None:
        require_each(self, "", at_least(1, ", or null"), "num_samples")

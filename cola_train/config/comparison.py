"""Settings of the metrics that compare families: what models write, judged alike."""

import dataclasses

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import require, section, setting


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """`cola-train compare`: continuations of held-out openings."""

    num_openings: int = setting(256, help="Held-out openings to continue, at most.")
    num_new_tokens: int = setting(32, help="Tokens to generate after each.")
    judge_order: int = setting(4, help="Longest n-gram of the judge, which is trained on the training rows.")
    sampler: SamplerConfig = section(
        SamplerConfig, help="How text is generated that the judge reads; next words are taken greedily (temperature 0) by it."
    )

    def __post_init__(self) -> None:
        for name in ("num_openings", "num_new_tokens", "judge_order"):
            require(getattr(self, name) >= 1, f"comparison.{name} must be at least 1, not {getattr(self, name)}.")

"""Settings of the masked diffusion baseline, LLaDA (method, section 8, Table 9)."""

import dataclasses
from typing import Literal

from cola_train.config.settings import require, section, setting
from cola_train.families.transformer.config import BaselineRunConfig


@dataclasses.dataclass(frozen=True)
class MaskedDiffusionConfig:
    """LLaDA: tokens are masked with probability t; cross-entropy at masked tokens weighs 1/t."""

    min_mask_prob: float = setting(
        1e-3,
        help="t is uniform in (min_mask_prob, 1], which bounds the weight 1/t; not stated in the "
        "paper.",
    )
    mask_documents: bool = setting(
        False, help="Keep documents of a packed row apart; not stated in the paper."
    )

    def __post_init__(self) -> None:
        require(
            0 < self.min_mask_prob < 1,
            f"objective.min_mask_prob must be in (0, 1), not {self.min_mask_prob}.",
        )


@dataclasses.dataclass(frozen=True)
class LLaDARunConfig(BaselineRunConfig):
    """`cola-train llada`: the masked diffusion baseline."""

    stage: Literal["llada"] = setting("llada", help="Which stage a saved config is of.")
    objective: MaskedDiffusionConfig = section(MaskedDiffusionConfig, help="The loss.")

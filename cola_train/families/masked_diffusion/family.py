"""The masked diffusion baseline, LLaDA, and its settings (method, section 8, Table 9)."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from cola_train.config.settings import BETWEEN_0_AND_1, Settings, section, setting
from cola_train.families.transformer.family import BaselineRunConfig, TransformerFamily

if TYPE_CHECKING:
    from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint
    from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective


@dataclasses.dataclass(frozen=True)
class MaskedDiffusionConfig(Settings):
    """LLaDA: tokens are masked with probability t; cross-entropy at masked tokens weighs 1/t."""

    min_mask_prob: float = setting(
        1e-3,
        help="t is uniform in (min_mask_prob, 1], which bounds the weight 1/t; not stated in the "
        "paper.",
        rule=BETWEEN_0_AND_1,
    )
    mask_documents: bool = setting(
        False, help="Keep documents of a packed row apart; not stated in the paper."
    )


@dataclasses.dataclass(frozen=True)
class LLaDARunConfig(BaselineRunConfig):
    """`cola-train llada`: the masked diffusion baseline."""

    stage: Literal["llada"] = setting("llada", help="Which stage a saved config is of.")
    objective: MaskedDiffusionConfig = section(MaskedDiffusionConfig, help="The loss.")


class MaskedDiffusionFamily(TransformerFamily[LLaDARunConfig]):
    """Predicts masked tokens."""

    name = "llada"
    config = LLaDARunConfig
    objective = MaskedDiffusionConfig
    summary = "baseline: train a masked diffusion transformer (LLaDA)"
    example = "configs/paper/llada.yaml"

    def build(self, config: LLaDARunConfig) -> "MaskedDiffusionObjective":
        from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective
        from cola_train.models.transformer import Transformer

        transformer = Transformer(config.transformer, causal=False)
        return MaskedDiffusionObjective(transformer, config.objective, config.seed)

    def checkpoint_class(self) -> "type[MaskedDiffusionCheckpoint]":
        from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint

        return MaskedDiffusionCheckpoint

"""The LLaDA baseline, as a family."""

from typing import TYPE_CHECKING

from cola_train.families.masked_diffusion.config import LLaDARunConfig, MaskedDiffusionConfig
from cola_train.families.transformer.family import TransformerFamily

if TYPE_CHECKING:
    from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint
    from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective


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

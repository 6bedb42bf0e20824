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
    summary = "baseline: train a masked diffusion transformer (LLaDA)"
    example = "configs/paper/llada.yaml"

    def build(self, config: LLaDARunConfig) -> "MaskedDiffusionObjective":
        """A transformer that sees the whole row."""
        from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective
        from cola_train.models.transformer import Transformer

        return MaskedDiffusionObjective(
            Transformer(config.transformer, causal=False), config.objective, config.seed
        )

    def checkpoint_class(self) -> "type[MaskedDiffusionCheckpoint]":
        """The family's."""
        from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint

        return MaskedDiffusionCheckpoint

    def matched_objective(self, mask_documents: bool) -> MaskedDiffusionConfig:
        """Defaults, but for documents."""
        return MaskedDiffusionConfig(mask_documents=mask_documents)

"""The autoregressive baseline, as a family."""

from typing import TYPE_CHECKING

from cola_train.families.autoregressive.config import AutoregressiveConfig, AutoregressiveRunConfig
from cola_train.families.transformer.family import TransformerFamily

if TYPE_CHECKING:
    from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
    from cola_train.families.autoregressive.objective import AutoregressiveObjective


class AutoregressiveFamily(TransformerFamily[AutoregressiveRunConfig]):
    """Predicts the next token."""

    name = "ar"
    config = AutoregressiveRunConfig
    summary = "baseline: train an autoregressive transformer"
    example = "configs/paper/ar.yaml"

    def build(self, config: AutoregressiveRunConfig) -> "AutoregressiveObjective":
        """A transformer that sees what comes before."""
        from cola_train.families.autoregressive.objective import AutoregressiveObjective
        from cola_train.models.transformer import Transformer

        return AutoregressiveObjective(
            Transformer(config.transformer, causal=True), config.objective
        )

    def checkpoint_class(self) -> "type[AutoregressiveCheckpoint]":
        """The family's."""
        from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint

        return AutoregressiveCheckpoint

    def matched_objective(self, mask_documents: bool) -> AutoregressiveConfig:
        """Defaults, but for documents."""
        return AutoregressiveConfig(mask_documents=mask_documents)

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
    objective = AutoregressiveConfig
    summary = "baseline: train an autoregressive transformer"
    example = "configs/paper/ar.yaml"

    def build(self, config: AutoregressiveRunConfig) -> "AutoregressiveObjective":
        from cola_train.families.autoregressive.objective import AutoregressiveObjective
        from cola_train.models.transformer import Transformer

        transformer = Transformer(config.transformer, causal=True)
        return AutoregressiveObjective(transformer, config.objective)

    def checkpoint_class(self) -> "type[AutoregressiveCheckpoint]":
        from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint

        return AutoregressiveCheckpoint

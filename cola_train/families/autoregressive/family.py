"""The autoregressive baseline as a family, and its settings (method, section 8, Table 9)."""

import dataclasses
from typing import TYPE_CHECKING, Literal

from cola_train.config.settings import Settings, section, setting
from cola_train.families.transformer.family import BaselineRunConfig, TransformerFamily

if TYPE_CHECKING:
    from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
    from cola_train.families.autoregressive.objective import AutoregressiveObjective


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig(Settings):
    """Next-token prediction."""

    mask_documents: bool = setting(
        False, help="Keep documents of a packed row apart; not stated in the paper."
    )


@dataclasses.dataclass(frozen=True)
class AutoregressiveRunConfig(BaselineRunConfig):
    """`cola-train ar`: the autoregressive baseline."""

    stage: Literal["ar"] = setting("ar", help="Which stage a saved config is of.")
    objective: AutoregressiveConfig = section(AutoregressiveConfig, help="The loss.")


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

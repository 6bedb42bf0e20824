"""Settings of the autoregressive baseline (method, section 8, Table 9)."""

import dataclasses
from typing import Literal

from cola_train.config.settings import section, setting
from cola_train.families.transformer.config import BaselineRunConfig


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig:
    """Next-token prediction."""

    mask_documents: bool = setting(
        False, help="Keep documents of a packed row apart; not stated in the paper."
    )


@dataclasses.dataclass(frozen=True)
class AutoregressiveRunConfig(BaselineRunConfig):
    """`cola-train ar`: the autoregressive baseline."""

    stage: Literal["ar"] = setting("ar", help="Which stage a saved config is of.")
    objective: AutoregressiveConfig = section(AutoregressiveConfig, help="The loss.")

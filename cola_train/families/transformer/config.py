"""The run config that both transformer baselines share."""

import dataclasses

from cola_train.config.load import value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import section
from cola_train.models.config import TransformerConfig


@dataclasses.dataclass(frozen=True)
class BaselineRunConfig(RunConfig):
    """What both baselines share."""

    transformer: TransformerConfig = section(TransformerConfig, help="The network.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_loop_eval.check_family(("likelihood", "benchmarks"), self.stage)

    @property
    def vocab_size_key(self) -> str:
        return "transformer.vocab_size"

    @property
    def masks_documents(self) -> bool:
        return bool(value_at(self, "objective.mask_documents"))

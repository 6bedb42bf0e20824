"""What checkpoints of both transformer baselines share."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint, read_tokenizer
from cola_train.families.transformer.format import (
    Kind,
    model_type_of,
    read_config,
    write_transformer,
)
from cola_train.models.transformer import Transformer
from cola_train.run_layout import EXPORT
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES, load_tensors

CheckpointT = TypeVar("CheckpointT", bound="TransformerCheckpoint")


@dataclasses.dataclass
class TransformerCheckpoint(Checkpoint):
    """A baseline's network and its tokenizer, in memory, in fp32, ready for inference."""

    transformer: Transformer
    tokenizer: Tokenizer
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    kind: ClassVar[Kind]

    @classmethod
    def load(
        cls: type[CheckpointT], folder: str | Path, device: str | torch.device = "cpu"
    ) -> CheckpointT:
        """Read a folder that `save` wrote, as `Family.load`; a run folder stands for its export."""
        folder, wanted = Path(folder), cls.kind.model_type
        root = next((r for r in (folder, folder / EXPORT) if model_type_of(r) == wanted), None)
        if root is None:
            raise UserError(
                f"{folder} is no checkpoint of the {wanted} family: it has no config.json (nor "
                f"{EXPORT}/config.json) with that model_type; export one first."
            )
        config = read_config(root, cls.kind)
        transformer = Transformer(config, cls.kind.causal)
        load_tensors(transformer, root)
        held = read_tokenizer(root, config.vocab_size, "network")
        return cls(transformer.to(device).eval().requires_grad_(False), *held)

    def save(
        self,
        folder: str | Path,
        *,
        replace: bool = False,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        network = self.transformer
        write_transformer(
            Path(folder),
            network.config,
            network.state_dict(),
            self.kind,
            self.tokenizer,
            self.training,
            replace=replace,
            max_shard_bytes=max_shard_bytes,
        )

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.transformer}

    @property
    def vocab_size(self) -> int:
        return self.transformer.config.vocab_size

"""What checkpoints of both transformer baselines share."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.transformer.format import (
    Kind,
    check_tokenizer,
    model_type_of,
    read_config,
    write_transformer,
)
from cola_train.models.transformer import Transformer
from cola_train.run_layout import EXPORT
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES, TRAINING, load_tensors, read_json

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
        """Read a folder that `save` wrote; a run folder stands for its export.

        Raises:
            UserError: not such a folder; a config field that is unknown or unsupported; any tensor
                missing, unexpected or of the wrong shape (all are named); a truncated file; a
                tokenizer with more ids than the network.
        """
        folder = Path(folder)
        roots = [
            root for root in (folder, folder / EXPORT) if model_type_of(root) == cls.kind.model_type
        ]
        require(
            bool(roots),
            f"{folder} is no checkpoint of the {cls.kind.model_type} family: it has no config.json "
            f"(nor {EXPORT}/config.json) with that model_type; export one first.",
        )
        config = read_config(roots[0], cls.kind)
        transformer = Transformer(config, cls.kind.causal)
        load_tensors(transformer, roots[0])
        tokenizer = Tokenizer.load(roots[0] / "tokenizer.json")
        check_tokenizer(roots[0], tokenizer, config)
        training = read_json(roots[0] / TRAINING)[0] if (roots[0] / TRAINING).is_file() else {}
        return cls(transformer.to(device).eval().requires_grad_(False), tokenizer, training)

    def save(
        self,
        folder: str | Path,
        *,
        replace: bool = False,
        max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    ) -> None:
        """Write the folder, atomically; `replace` allows an existing one to be swapped for the new
        one.
        """
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
        """The transformer."""
        return {"transformer": self.transformer}

    @property
    def vocab_size(self) -> int:
        """The transformer's."""
        return self.transformer.config.vocab_size

"""What the baselines' checkpoints share: Hugging Face's Llama folder; LLaDA's has a [mask] row."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError, require
from cola_train.data.special_tokens import NAMES_FILE
from cola_train.data.tokenizer import Tokenizer
from cola_train.export_files import (
    CONFIG_JSON,
    TRAINING,
    add_checksums,
    model_type,
    read_json,
    write_json,
)
from cola_train.families.checkpoint import Checkpoint, read_tokenizer
from cola_train.files import atomic_folder
from cola_train.models.config import TransformerConfig
from cola_train.models.transformer import Transformer
from cola_train.run_layout import EXPORT
from cola_train.tensor_files import (
    DEFAULT_MAX_SHARD_BYTES,
    load_network,
    shapes_of,
    write_tensors,
)

CheckpointT = TypeVar("CheckpointT", bound="TransformerCheckpoint")


# For other programs: here the tokenizer and training.json say it.
_NOT_READ = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
# For transformers' AutoTokenizer; without the last, its version 4 takes out spaces when decoding.
_TOKENIZER_FIELDS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "clean_up_tokenization_spaces": False,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What tells a baseline's folder from another's."""

    model_type: str
    architecture: str
    causal: bool


def model_type_of(folder: Path) -> object:
    """A folder's model_type; None without config.json, or of Cola DLM (any hub's file)."""
    return None if (folder / "cola_dlm").is_dir() else model_type(folder)


def write_transformer(
    folder: Path,
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    kind: Kind,
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    *,
    replace: bool,
    max_shard_bytes: int,
) -> None:
    """Write a network, fp32, and its tokenizer, atomically, one file's tensors at a time.

    `training` (stage, step, seq_len) goes to training.json, which no other program reads; seq_len
    also to config.json, as max_position_embeddings.
    """
    shapes = shapes_of(lambda: Transformer(config, kind.causal), folder)
    fields = {
        **config.to_json(),
        **_fixed_fields(config, kind),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if "seq_len" in training:
        fields["max_position_embeddings"] = training["seq_len"]
    with atomic_folder(folder, replace=replace) as working:
        write_json(working / CONFIG_JSON, fields)
        write_tensors(working, shapes, state, max_shard_bytes)
        tokenizer.save(working / "tokenizer.json")
        names = tokenizer.special_tokens.fields()
        write_json(working / NAMES_FILE, {**_TOKENIZER_FIELDS, **names})
        if training:
            write_json(working / TRAINING, training)
        add_checksums(working, [CONFIG_JSON, "tokenizer.json", NAMES_FILE, TRAINING])


def read_config(root: Path, kind: Kind) -> TransformerConfig:
    """The network's config.

    Raises:
        UserError: a field that is unknown or not supported.
    """
    fields, origin = read_json(root / CONFIG_JSON)
    not_own = {*_fixed_fields(TransformerConfig(), kind), *_NOT_READ}
    own = {name: value for name, value in fields.items() if name not in not_own}
    config = TransformerConfig.from_json(own, origin)
    for name, value in _fixed_fields(config, kind).items():
        given = fields.get(name, value)
        require(
            given == value, f"{origin}: {name} = {given!r} is not supported here, only {value!r}."
        )
    return config


def _fixed_fields(config: TransformerConfig, kind: Kind) -> dict[str, Any]:
    """What Hugging Face's Llama can be told but follows from the rest here."""
    fields = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "num_key_value_heads": config.num_attention_heads,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return fields if kind.causal else {**fields, "mask_token_id": config.vocab_size}


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
        build = functools.partial(Transformer, config, cls.kind.causal)
        transformer = load_network(build, config.num_blocks, root)
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

    def refuse_others_settings(self, config: SamplerConfig) -> None:
        """Refuse what is set of latents and noise, by name: a baseline has neither."""
        for name in ("noise_scale", "history"):
            value, neutral = getattr(config, name), getattr(SamplerConfig(), name)
            require(
                value == neutral,
                f"{name} ({value}) is a setting of Cola DLM's sampler and means nothing for a "
                f"checkpoint of `cola-train {self.family}`; leave it at {neutral}.",
            )

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"transformer": self.transformer}

    @property
    def vocab_size(self) -> int:
        return self.transformer.config.vocab_size

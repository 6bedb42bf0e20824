"""The baselines' checkpoints: Hugging Face's Llama folder for AR, and the same with a [mask] row for LLaDA (docs/baselines.md)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cola_train.config.baselines import TransformerConfig
from cola_train.config.settings import UserError, require
from cola_train.data.tokenizer import EOS_TOKEN, PAD_TOKEN, Tokenizer
from cola_train.files import atomic_folder
from cola_train.hf_format import Checkpoint, Trained
from cola_train.models.transformer import Transformer
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES, load_tensors, read_json, write_json, write_tensors

_TRAINING = "training.json"
_AR, _LLADA = "llama", "cola_llada"
_ARCHITECTURES = {_AR: "LlamaForCausalLM", _LLADA: "ColaLLaDAModel"}
# For other programs: here the tokenizer and training.json say it.
_NOT_READ = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")
# For transformers' AutoTokenizer; without the last, its version 4 takes out spaces when decoding.
_TOKENIZER_FIELDS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": EOS_TOKEN,
    "pad_token": PAD_TOKEN,
    "clean_up_tokenization_spaces": False,
}


@dataclasses.dataclass
class BaselineCheckpoint(Trained):
    """A baseline's network and its tokenizer, in memory, in fp32, ready for inference."""

    transformer: Transformer
    tokenizer: Tokenizer
    training: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `cola-train` wrote of the run
    casts: dict[tuple[nn.Module, torch.device], nn.Module] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> "BaselineCheckpoint":
        """Read a folder that `write_baseline` wrote; a run folder stands for its `hf` export.

        Raises:
            UserError: not such a folder; a config field that is unknown or unsupported; any tensor missing, unexpected or of the
                wrong shape (all are named); a truncated file; a tokenizer with more ids than the network.
        """
        root = find_baseline(Path(folder))
        if root is None:
            raise UserError(f"{folder} is no baseline's checkpoint: it has no config.json (nor hf/config.json); export one first.")
        config, causal = _read_config(root)
        transformer = Transformer(config, causal)
        load_tensors(transformer, root)
        tokenizer = Tokenizer.load(root / "tokenizer.json")
        require(tokenizer.vocab_size <= config.vocab_size,
                f"{root}: the tokenizer has {tokenizer.vocab_size} ids, the network only {config.vocab_size}; "
                "put the tokenizer.json there that the checkpoint was trained with.")  # fmt: skip
        transformer.to(device).eval().requires_grad_(False)
        return cls(transformer, tokenizer, read_json(root / _TRAINING)[0] if (root / _TRAINING).is_file() else {})

    def save(self, folder: str | Path, *, replace: bool = False, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES) -> None:
        """Write the folder, atomically; `replace` allows an existing one to be swapped for the new one."""
        network = self.transformer
        write_baseline(
            Path(folder), network.config, network.state_dict(), network.causal, self.tokenizer, self.training,
            replace=replace, max_shard_bytes=max_shard_bytes,
        )  # fmt: skip


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Checkpoint | BaselineCheckpoint:
    """A checkpoint of any family: `cola_dlm/` is Cola's, a config.json a baseline's. A run folder stands for its `hf` export.

    Raises:
        UserError: as the families' own `load`.
    """
    family = Checkpoint if find_baseline(Path(folder)) is None else BaselineCheckpoint
    return family.load(folder, device)


def find_baseline(folder: Path) -> Path | None:
    """The folder of a baseline's checkpoint: the given one, or its `hf` (a run folder); None if neither is one."""
    # A folder with `cola_dlm` is Cola's, whatever its hub put beside it.
    roots = (root for root in (folder, folder / "hf") if not (root / "cola_dlm").is_dir())
    return next((root for root in roots if (root / "config.json").is_file()), None)


def write_baseline(
    folder: Path,
    config: TransformerConfig,
    state: Mapping[str, Tensor],
    causal: bool,
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    *,
    replace: bool = False,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a network, fp32, and its tokenizer, atomically; of `state` one file's tensors are asked for at a time.

    `training` (stage, step, seq_len) goes to training.json, which no other program reads; seq_len also to config.json, as
    max_position_embeddings.
    """
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Transformer(config, causal).state_dict().items()}
    with atomic_folder(folder, replace=replace) as working:
        write_json(working / "config.json", _config_fields(config, causal, tokenizer, training))
        write_tensors(working, shapes, state, max_shard_bytes)
        tokenizer.save(working / "tokenizer.json")
        write_json(working / "tokenizer_config.json", _TOKENIZER_FIELDS)
        if training:
            write_json(working / _TRAINING, training)


def _fixed_fields(config: TransformerConfig, causal: bool) -> dict[str, Any]:
    """What Hugging Face's Llama can be told but follows from the rest here."""
    model_type = _AR if causal else _LLADA
    fields = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "num_key_value_heads": config.num_attention_heads,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    return fields if causal else {**fields, "mask_token_id": config.vocab_size}


def _config_fields(config: TransformerConfig, causal: bool, tokenizer: Tokenizer, training: Mapping[str, Any]) -> dict[str, Any]:
    fields = {**config.to_json(), **_fixed_fields(config, causal)}
    fields |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if "seq_len" in training:
        fields["max_position_embeddings"] = training["seq_len"]
    return fields


def _read_config(root: Path) -> tuple[TransformerConfig, bool]:
    fields, origin = read_json(root / "config.json")
    model_type = fields.get("model_type")
    if model_type not in tuple(_ARCHITECTURES):
        raise UserError(f"{origin}: model_type must be one of {', '.join(_ARCHITECTURES)}, not {model_type!r}.")
    causal = model_type == _AR
    fixed_names = _fixed_fields(TransformerConfig(), causal)
    own = {name: value for name, value in fields.items() if name not in fixed_names and name not in _NOT_READ}
    config = TransformerConfig.from_json(own, origin)
    for name, value in _fixed_fields(config, causal).items():
        given = fields.get(name, value)
        require(given == value, f"{origin}: {name} = {given!r} is not supported here, only {value!r}.")
    return config, causal

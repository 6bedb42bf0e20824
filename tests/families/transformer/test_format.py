"""Baselines' folders: transformers reads AR's as a Llama, and both come back as they went out."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from cola_train.config.settings import UserError
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.registry import load_checkpoint
from cola_train.families.transformer.checkpoint import TransformerCheckpoint, write_transformer
from tests.helpers.compare import assert_near
from tests.helpers.llama import TRANSFORMER_CONFIG, tiny_baseline, tiny_transformer
from tests.helpers.tiny import random_tokens, tiny_tokenizer

FACTS = {"stage": "ar", "step": 30, "seq_len": 64}
# No value that transformers would assume by itself.
UNUSUAL = {"rope_theta": 50.0, "rms_norm_eps": 0.3, "head_dim": 6, "initializer_range": 0.07}


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **changes}), encoding="utf-8")


@pytest.fixture(params=[True, False], ids=["ar", "llada"])
def baseline(request: pytest.FixtureRequest) -> TransformerCheckpoint:
    return tiny_baseline(causal=request.param)


@pytest.fixture
def saved(baseline: TransformerCheckpoint, tmp_path: Path) -> Path:
    """A good checkpoint on disk, for the test to damage."""
    baseline.save(tmp_path / "saved")
    return tmp_path / "saved"


def assert_refused(folder: Path, *reasons: str) -> None:
    """Loading fails with every one of `reasons`, plain text, in its message."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(folder)
    for reason in reasons:
        assert reason in str(caught.value)


# In transformers


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_transformers_loads_ar_as_a_llama(tmp_path: Path, max_shard_bytes: int) -> None:
    baseline = tiny_baseline(causal=True, **UNUSUAL)
    baseline.training = FACTS
    baseline.save(tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (max_shard_bytes == 3000)
    llama, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())  # nothing missing, unexpected, mismatched or wrong
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert (llama.config.max_position_embeddings, llama.config.initializer_range) == (64, 0.07)
    assert (llama.config.eos_token_id, llama.config.pad_token_id, llama.config.bos_token_id) == (
        0,
        3,
        None,
    )
    tokens = random_tokens(2, 12, seed=5)
    with torch.no_grad():
        assert_near(
            llama(tokens).logits, baseline.transformer.head(baseline.transformer(tokens)), 1e-4
        )


def test_transformers_loads_the_tokenizer(saved: Path, baseline: TransformerCheckpoint) -> None:
    theirs = AutoTokenizer.from_pretrained(saved)
    text = "w5 w6 w7<|endoftext|>w8"
    ids = baseline.tokenizer.encode(text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids, skip_special_tokens=True) == baseline.tokenizer.decode(ids)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token_id) == (0, 3, None)


# Both ways


@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_what_is_loaded_is_what_was_saved_and_ready_for_inference(
    baseline: TransformerCheckpoint, tmp_path: Path, max_shard_bytes: int
) -> None:
    baseline.training = FACTS
    baseline.save(tmp_path / "run" / "hf", max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path / "run")  # a run folder stands for its export
    assert isinstance(loaded, TransformerCheckpoint)
    assert (loaded.training, loaded.trained_seq_len) == (FACTS, 64)
    assert loaded.tokenizer.content == baseline.tokenizer.content
    ours, theirs = baseline.transformer, loaded.transformer
    assert (ours.config, ours.causal) == (theirs.config, theirs.causal)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(
        torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items()
    )
    assert not theirs.training
    assert not any(parameter.requires_grad for parameter in theirs.parameters())


def test_llada_says_what_it_is(tmp_path: Path) -> None:
    tiny_baseline(causal=False).save(tmp_path / "out")
    fields = read_json(tmp_path / "out" / "config.json")
    assert (fields["model_type"], fields["architectures"]) == ("cola_llada", ["ColaLLaDAModel"])
    assert (fields["vocab_size"], fields["mask_token_id"]) == (29, 29)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert (len(tensors["model.embed_tokens.weight"]), len(tensors["lm_head.weight"])) == (30, 29)


def test_a_checkpoint_that_says_nothing_of_its_training(saved: Path) -> None:
    assert not (saved / "training.json").exists()
    assert "max_position_embeddings" not in read_json(saved / "config.json")
    assert load_checkpoint(saved).trained_seq_len is None


def test_each_family_is_known_by_its_files(
    checkpoint: ColaCheckpoint, baseline: TransformerCheckpoint, saved: Path, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path / "cola")
    # as a hub may put one there
    (tmp_path / "cola" / "config.json").write_text("{}", encoding="utf-8")
    assert isinstance(load_checkpoint(tmp_path / "cola"), ColaCheckpoint)
    assert type(load_checkpoint(saved)) is type(baseline)
    assert_refused(
        tmp_path,
        f"{tmp_path} holds no checkpoint of any family (vae, joint, distill, ar, llada)",
        "cola-train export RUN",
    )
    with pytest.raises(
        UserError,
        match=(
            r"cola is no checkpoint of the \w+ family: it has no config\.json \(nor "
            r"hf/config\.json\)"
        ),
    ):
        type(baseline).load(tmp_path / "cola")


class AskedFor(Mapping[str, Tensor]):
    """A state that notes how many files were written when each of its tensors was first asked
    for.
    """

    def __init__(self, state: Mapping[str, Tensor], folder: Path) -> None:
        self.state, self.folder, self.files = state, folder, dict[str, int]()

    def __getitem__(self, name: str) -> Tensor:
        self.files.setdefault(name, len(list(self.folder.rglob("*.safetensors"))))
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_tensors_are_asked_for_a_file_at_a_time(tmp_path: Path) -> None:
    state = AskedFor(tiny_transformer(True).state_dict(), tmp_path)
    out, tokenizer = tmp_path / "out", tiny_tokenizer()
    write_transformer(
        out,
        TRANSFORMER_CONFIG,
        state,
        AutoregressiveCheckpoint.kind,
        tokenizer,
        FACTS,
        replace=False,
        max_shard_bytes=3000,
    )
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert state.files.keys() == index.keys()
    assert len(set(index.values())) > 2
    for name, file in index.items():
        assert state.files[name] == int(file.split("-")[1]) - 1


# What is refused


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (
            {"model_type": "mistral"},
            "config.json says model_type = 'mistral', which is that of no family here",
        ),
        (
            {"model_type": ["llama"]},
            "config.json says model_type = ['llama'], which is that of no family here",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported here, only 'silu'."),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1 is not supported here, only 2."),
        (
            {"tie_word_embeddings": True},
            "tie_word_embeddings = True is not supported here, only False.",
        ),
        ({"attention_bias": True}, "attention_bias = True is not supported here, only False."),
        ({"rope_scaling": {"factor": 2}}, "unknown field 'rope_scaling'"),
        ({"architectures": ["Other"]}, "architectures = ['Other'] is not supported here"),
        ({"hiden_size": 16}, "unknown field 'hiden_size'; did you mean 'hidden_size'?"),
        ({"hidden_size": "16"}, "field 'hidden_size' must be of type"),
        ({"head_dim": 5}, "head_dim must be even for RoPE, not 5"),
        ({"hidden_size": 32}, "model.norm.weight: shape (16,), the config needs (32,)"),
    ],
    ids=str,
)
def test_fields_that_are_unknown_or_unsupported(
    saved: Path, field: dict[str, Any], message: str
) -> None:
    edit_json(saved / "config.json", **field)
    assert_refused(saved, message)


def test_one_family_is_not_taken_for_the_other(
    saved: Path, baseline: TransformerCheckpoint
) -> None:
    edit_json(
        saved / "config.json", model_type="cola_llada" if baseline.transformer.causal else "llama"
    )
    assert_refused(
        saved,
        "architectures = " if baseline.transformer.causal else "unknown field 'mask_token_id'",
    )


def test_another_mask_id(tmp_path: Path) -> None:
    tiny_baseline(causal=False).save(tmp_path / "out")
    edit_json(tmp_path / "out" / "config.json", mask_token_id=3)
    assert_refused(tmp_path / "out", "mask_token_id = 3 is not supported here, only 29.")


def test_files_that_are_damaged_or_do_not_fit(saved: Path) -> None:
    tokenizer = saved / "tokenizer.json"
    tokenizer.write_bytes(tiny_tokenizer(30).content)
    assert_refused(saved, "tokenizer.json has 1109 bytes, checksums.json says")
    (saved / "checksums.json").unlink()
    assert_refused(
        saved,
        f"{saved}: the tokenizer has 30 ids, the network only 29",
        "put the tokenizer.json there",
    )
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert_refused(saved, f"{weights} is corrupt or truncated")


def test_what_exists_is_not_overwritten_unasked(saved: Path) -> None:
    other = tiny_baseline(causal=True, num_hidden_layers=1)
    with pytest.raises(UserError, match="exists and is not overwritten"):
        other.save(saved)
    other.save(saved, replace=True)
    loaded = load_checkpoint(saved)
    assert isinstance(loaded, TransformerCheckpoint)
    assert loaded.transformer.config == other.transformer.config

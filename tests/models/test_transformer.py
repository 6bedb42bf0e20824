"""The baselines' transformer against transformers' Llama, and over documents and a cache."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from cola_train.models.attention.cached import CachedAttention
from cola_train.models.config import TransformerConfig
from cola_train.models.transformer import RMSNorm, Transformer
from tests.helpers.compare import assert_near, largest_difference
from tests.helpers.llama import llama_logits, llama_of, tiny_transformer
from tests.helpers.tiny import random_tokens

VARIANTS: list[dict[str, Any]] = [
    {},
    {"rope_theta": 10.0},
    {"rms_norm_eps": 0.3},
    {"head_dim": 8, "num_attention_heads": 4},
    {"num_hidden_layers": 3, "hidden_size": 10, "intermediate_size": 7},
]


def logits_of(network: Transformer, tokens: Tensor, document: Tensor | None = None) -> Tensor:
    return network.head(network(tokens, document))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_equal_llamas(changes: dict[str, Any], causal: bool) -> None:
    network, tokens = tiny_transformer(causal, **changes), random_tokens(2, 9, seed=4)
    if not causal:
        tokens[0, 3] = tokens[1, 0] = network.mask_token_id
    visible = torch.ones(2, 9, 9, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    logits = logits_of(network, tokens)
    assert logits.shape == (2, 9, 29)
    assert_near(logits, llama_logits(network, tokens, visible, torch.arange(9).expand(2, 9)))


@pytest.mark.parametrize("changes", VARIANTS[1:3], ids=str)
def test_the_settings_that_change_no_shape_matter(changes: dict[str, Any]) -> None:
    tokens = random_tokens(1, 9, seed=4)
    assert (
        largest_difference(
            logits_of(tiny_transformer(True), tokens),
            logits_of(tiny_transformer(True, **changes), tokens),
        )
        > 1e-2
    )


@settings(max_examples=15)
@given(st.booleans(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_documents_of_a_row_equal_each_alone(causal: bool, lengths: list[int]) -> None:
    network, tokens = tiny_transformer(causal), random_tokens(1, sum(lengths), seed=5)
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    together = logits_of(network, tokens, document).split(lengths, dim=1)
    for ours, alone in zip(together, tokens.split(lengths, dim=1), strict=True):
        assert_near(ours, logits_of(network, alone))


@pytest.mark.parametrize("causal", [True, False])
def test_without_documents_a_row_is_one_text(causal: bool) -> None:
    """Else the comparison above could hold because nothing sees anything."""
    network, tokens = tiny_transformer(causal), random_tokens(1, 8, seed=6)
    whole = logits_of(network, tokens)
    assert largest_difference(whole[:, 4:], logits_of(network, tokens[:, 4:])) > 1e-2
    assert (largest_difference(whole[:, :4], logits_of(network, tokens[:, :4])) > 1e-2) == (
        not causal
    )


@settings(max_examples=15)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=3), st.integers(1, 3))
def test_passes_over_a_cache_equal_one_pass(lengths: list[int], added: int) -> None:
    """Rows with any numbers of committed tokens, then two passes more."""
    network, rows = tiny_transformer(True), len(lengths)
    tokens = random_tokens(rows, 6 + 2 * added, seed=7)
    whole = logits_of(network, tokens)
    cache = network.new_cache(rows, tokens.shape[1])

    def cached(new: Tensor) -> Tensor:
        attention = CachedAttention(
            cache, torch.ones(new.shape[1], new.shape[1], dtype=torch.bool).tril()
        )
        return network.head(network(new, positions=attention.slots, attention=attention))

    if max(lengths):
        cached(tokens[:, : max(lengths)])
        cache.commit(lengths)
    for _ in range(2):
        at = torch.tensor(cache.lengths)[:, None] + torch.arange(added)
        assert_near(cached(tokens.gather(1, at)), whole.gather(1, at[..., None].expand(-1, -1, 29)))
        cache.commit([added] * rows)


def test_norms_compute_in_fp32_whatever_the_type() -> None:
    """Bit by bit as Llama's; squares of these overflow fp16."""
    ours, theirs = RMSNorm(32, 1e-3), LlamaRMSNorm(32, 1e-3)
    x = 3000 * torch.randn(5, 32, generator=torch.Generator().manual_seed(8))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.no_grad():
            weight = torch.linspace(0.5, 2, 32)
            ours.weight.copy_(weight)
            theirs.weight.copy_(weight)
            out = ours.to(dtype)(x.to(dtype))
            assert out.dtype == dtype
            assert torch.equal(out, theirs.to(dtype)(x.to(dtype)))
            assert (
                largest_difference(
                    out.float(), weight * x / x.square().mean(-1, keepdim=True).sqrt()
                )
                < 0.05
            )


def test_tensors_are_llamas() -> None:
    """LLaDA has one row more to look up, and none to predict."""
    network = tiny_transformer(True)
    wanted = {name: tuple(tensor.shape) for name, tensor in llama_of(network).state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()} == wanted
    wanted["model.embed_tokens.weight"] = (30, 16)
    assert {
        name: tuple(tensor.shape) for name, tensor in tiny_transformer(False).state_dict().items()
    } == wanted


def test_the_paper_size() -> None:
    with torch.device("meta"):
        network, llada = (
            Transformer(TransformerConfig(), causal=True),
            Transformer(TransformerConfig(), causal=False),
        )
    total = sum(parameter.numel() for parameter in network.parameters())
    vocabulary = network.model.embed_tokens.weight.numel() + network.lm_head.weight.numel()
    assert (total - vocabulary, vocabulary) == (1_812_051_968, 410_738_688)
    assert sum(parameter.numel() for parameter in llada.parameters()) == total + 2048
    assert llada.mask_token_id == 100_278

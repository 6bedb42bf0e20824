"""Baselines small enough for loops in Python, and transformers' Llama with the same weights."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.masked_diffusion.checkpoint import MaskedDiffusionCheckpoint
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.models.config import TransformerConfig
from cola_train.models.transformer import Transformer
from tests.helpers.tiny import VAE_CONFIG, randomize, tiny_tokenizer

TRANSFORMER_CONFIG = TransformerConfig(
    vocab_size=VAE_CONFIG.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=6,
)


def tiny_transformer(causal: bool, seed: int = 3, **changes: Any) -> Transformer:
    network = randomize(
        Transformer(dataclasses.replace(TRANSFORMER_CONFIG, **changes), causal), seed
    )
    return network.eval().requires_grad_(False)


def tiny_baseline(causal: bool, **changes: Any) -> TransformerCheckpoint:
    kind = AutoregressiveCheckpoint if causal else MaskedDiffusionCheckpoint
    return kind(tiny_transformer(causal, **changes), tiny_tokenizer())


def llama_of(network: Transformer) -> LlamaForCausalLM:
    """With LLaDA's weights, its head has one id more than ours: [mask], of no consequence."""
    fields = dataclasses.asdict(network.config)
    theta, rows = fields.pop("rope_theta"), network.model.embed_tokens.num_embeddings
    config = LlamaConfig(
        **{**fields, "vocab_size": rows},
        num_key_value_heads=network.config.num_attention_heads,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config).eval().requires_grad_(False)
    state = network.state_dict()
    extra = torch.zeros(rows - network.config.vocab_size, config.hidden_size)
    state["lm_head.weight"] = torch.cat([state["lm_head.weight"], extra])
    llama.load_state_dict(state)
    return llama


def llama_logits(
    network: Transformer, tokens: Tensor, visible: Tensor, positions: Tensor
) -> Tensor:
    """Logits of transformers' Llama where `visible` (batch, seq, seq) says who sees whom."""
    bias = torch.where(visible, 0.0, -torch.inf)[:, None]
    logits = llama_of(network)(tokens, attention_mask=bias, position_ids=positions).logits
    return logits[..., : network.config.vocab_size]

"""The baselines' LLaMA transformer (method, section 8); parameter names of Hugging Face's Llama."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cola_train.models.attention.cached import KVCache
from cola_train.models.attention.rows import Attention, LayerAttention
from cola_train.models.blocks import Block, through_blocks
from cola_train.models.config import TransformerConfig
from cola_train.models.layers import CosSin, Hidden, apply_rope_half
from cola_train.models.vocabulary_head import VocabularyHead


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in fp32 whatever the type of x, times a weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*positions dim"]) -> Float[Tensor, "*positions dim"]:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class _SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        inner = self.heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos_sin: CosSin, attention: LayerAttention) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in projections)
        q, k = apply_rope_half(q, cos_sin), apply_rope_half(k, cos_sin)
        attended = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(Block):
    """x = x + attention(norm(x)); x = x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Hidden, cos_sin: CosSin, attention: LayerAttention) -> Hidden:
        """One block; `cos_sin` rotates q and k, `attention` says what they attend over."""
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Body(nn.Module):
    def __init__(self, config: TransformerConfig, rows: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, config.hidden_size)
        blocks = (TransformerBlock(config) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """Tokens to hidden states (`forward`) to logits (`head`).

    Causal for the AR baseline; LLaDA's positions see whole rows, and its embedding has one row more
    than there are token ids: [mask]'s.
    """

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.model = _Body(config, config.vocab_size + (not causal))
        self.lm_head = VocabularyHead(config.hidden_size, config.vocab_size, bias=False)

    @property
    def mask_token_id(self) -> int:
        """The id of [mask], for LLaDA."""
        assert not self.causal
        return self.config.vocab_size

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"] | None = None,
        positions: Int[Tensor, "#batch seq"] | None = None,
        attention: Attention | None = None,
    ) -> Hidden:
        """Hidden states before the vocabulary head; ids of LLaDA may be [mask].

        `document` keeps documents apart and restarts positions. A sampler gives both RoPE
        `positions` and what to attend over in place of the row.
        """
        # Where weights are gathered in bf16, the sums over layers are fp32 all the same.
        x = self.model.embed_tokens(tokens).float()
        head_dim, base = self.config.head_dim, self.config.rope_theta
        size, layers = 1 if self.causal else tokens.shape[1], self.model.layers
        x = through_blocks(layers, x, head_dim, base, size, document, positions, attention)
        return self.model.norm(x)

    def head(self, hidden: Float[Tensor, "*positions dim"]) -> Float[Tensor, "*positions vocab"]:
        """Logits of hidden states."""
        return self.lm_head(hidden)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for generating rows of `capacity` tokens."""
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        return KVCache(layers, batch, capacity, heads, self.config.head_dim, self.lm_head.weight)

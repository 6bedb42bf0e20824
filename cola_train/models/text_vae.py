"""The Text VAE: tokens -> posterior of latents -> logits; the release's names and arithmetic."""

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cola_train.models.attention.cached import KVCache
from cola_train.models.attention.rows import Attention, LayerAttention
from cola_train.models.blocks import Block, HasStacks, through_blocks
from cola_train.models.config import TextVAEConfig
from cola_train.models.layers import CosSin, Hidden, apply_rope_half
from cola_train.models.vocabulary_head import VocabularyHead

_LOG_VARIANCE_RANGE = (-30.0, 20.0)
Latents = Float[Tensor, "batch latents channels"]
Nats = Float[Tensor, "batch latents"]
Tokens = Int[Tensor, "batch seq"]
Documents = Int[Tensor, "batch latents"] | None  # of each latent; None: attention crosses documents


@dataclasses.dataclass(frozen=True)
class Posterior:
    """q_phi(z0 | x) over normalized latents: mean and log-variance per position and channel."""

    mean: Latents
    logvar: Latents

    def sample(self, eps: Latents) -> Latents:
        """z_0 = mean + std * eps, with eps from N(0, I)."""
        return self.mean + torch.exp(0.5 * self.logvar) * eps

    def with_log_snr(self, log_snr: float) -> "Posterior":
        """With a fixed logSNR: sigma^2 = exp(-logSNR), since E[mu^2] = 1 (method, section 1)."""
        return Posterior(self.mean, torch.full_like(self.logvar, -log_snr))

    def kl_to_standard_normal(self) -> Nats:
        """KL(q || N(0, I)), summed over channels."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)

    def kl_to(self, other: "Posterior") -> Nats:
        """KL(q || other), closed form, summed over channels."""
        ratio = torch.exp(self.logvar - other.logvar)
        distance = (self.mean - other.mean).square() * torch.exp(-other.logvar)
        return 0.5 * (ratio + distance - 1 + other.logvar - self.logvar).sum(-1)

    def negative_entropy(self) -> Nats:
        """E_q[log q], closed form, summed over channels."""
        return -0.5 * (1 + math.log(2 * math.pi) + self.logvar).sum(-1)


class TextVAEBlock(Block, HasStacks):
    """The released residual arrangement: x = norm_attn(x) + a; x = x + norm_ffn(ffn(x))."""

    stacks: ClassVar = {"qkv_proj": 3, "ffn_proj": 2}

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        dim, eps = config.dim, config.layer_norm_eps
        self.config = config
        self.norm_attn = nn.LayerNorm(dim, eps=eps, elementwise_affine=config.layer_norm_affine)
        self.norm_ffn = nn.LayerNorm(dim, eps=eps)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=config.qk_bias)
        if config.qk_norm:
            self.q_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=config.qk_norm_affine)
            self.k_norm = nn.LayerNorm(dim, eps=eps, elementwise_affine=config.qk_norm_affine)
        self.attn_out_proj = nn.Linear(dim, dim, bias=config.bias)
        self.ffn_proj = nn.Linear(dim, config.ffn_dim, bias=config.bias)
        self.ffn_out = nn.Linear(config.ffn_dim // 2, dim, bias=config.bias)

    def forward(self, x: Hidden, cos_sin: CosSin, attention: LayerAttention) -> Hidden:
        """One block; `cos_sin` rotates q and k, `attention` says what they attend over."""
        if self.config.post_norm:
            # The first norm is on the residual stream itself, not on what the attention reads or
            # gives: a released quirk.
            x = self.norm_attn(x) + self._attend(x, cos_sin, attention)
            return x + self.norm_ffn(self._feed_forward(x))
        x = x + self._attend(self.norm_attn(x), cos_sin, attention)
        return x + self._feed_forward(self.norm_ffn(x))

    def _attend(self, x: Tensor, cos_sin: CosSin, attention: LayerAttention) -> Tensor:
        qkv = self.qkv_proj(x)
        if self.config.clip_qkv is not None:
            qkv = qkv.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        q, k, v = qkv.chunk(3, dim=-1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (y.unflatten(-1, (self.config.num_heads, -1)) for y in (q, k, v))
        q, k = apply_rope_half(q, cos_sin).to(v.dtype), apply_rope_half(k, cos_sin).to(v.dtype)
        attended = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.attn_out_proj(attended.transpose(1, 2).flatten(2))

    def _feed_forward(self, x: Tensor) -> Tensor:
        value, gate = self.ffn_proj(x).chunk(2, dim=-1)
        return self.ffn_out(F.silu(gate) * value)


class TextVAEEncoder(nn.Module):
    """q_phi: tokens -> diagonal Gaussian per latent, in the DiT's normalized latent space."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size + 1, config.dim)
        self.patch_embedder = nn.Conv1d(
            config.dim, config.dim, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.blocks = nn.ModuleList(TextVAEBlock(config) for _ in range(config.encoder_num_blocks))
        self.final_layer = nn.Linear(config.dim, 2 * config.latent_dim, bias=config.bias)

    def forward(
        self,
        tokens: Tokens,
        document: Documents = None,
        positions: Int[Tensor, "#batch latents"] | None = None,
        attention: Attention | None = None,
    ) -> Posterior:
        """Encode rows of latents x patch_size tokens; `document` keeps documents apart.

        A sampler that encodes block by block over a cache gives `positions` and `attention`.
        """
        config = self.config
        x = self.patch_embedder(self.wte(tokens).transpose(1, 2)).transpose(1, 2)
        x = through_blocks(self.blocks, x, *_rows_of(config), document, positions, attention)
        mean, logvar = self.final_layer(x).float().chunk(2, dim=-1)
        mean = F.layer_norm(mean, (config.latent_dim,), eps=config.layer_norm_eps)
        logvar = logvar.clamp(*_LOG_VARIANCE_RANGE)
        return Posterior(
            (mean - config.shifting_factor) * config.scaling_factor,
            logvar + 2 * math.log(abs(config.scaling_factor)),
        )


class TextVAEDecoder(nn.Module):
    """p_theta: normalized latents -> hidden states per token (`forward`) -> logits (`head`)."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.in_layer = nn.Linear(config.latent_dim, config.dim, bias=config.bias)
        self.blocks = nn.ModuleList(TextVAEBlock(config) for _ in range(config.decoder_num_blocks))
        self.unpatch_layer = nn.Linear(config.dim, config.patch_size * config.dim)
        self.final_norm = nn.LayerNorm(config.dim, eps=config.layer_norm_eps)
        self.final_layer = VocabularyHead(config.dim, config.vocab_size, bias=config.bias)

    def forward(
        self,
        z_0: Latents,
        document: Documents = None,
        positions: Int[Tensor, "#batch latents"] | None = None,
        attention: Attention | None = None,
    ) -> Hidden:
        """Hidden states before the vocabulary head, patch_size per latent.

        A sampler that decodes block by block over a cache gives `positions` and `attention`.
        """
        config = self.config
        x = self.in_layer(z_0 / config.scaling_factor + config.shifting_factor)
        x = through_blocks(self.blocks, x, *_rows_of(config), document, positions, attention)
        # The patch index runs fastest in the unpatched width.
        patches = self.unpatch_layer(x).unflatten(-1, (config.dim, config.patch_size))
        return self.final_norm(patches.transpose(2, 3).flatten(1, 2))

    def head(self, hidden: Float[Tensor, "*positions dim"]) -> Float[Tensor, "*positions vocab"]:
        """Logits of hidden states."""
        return self.final_layer(hidden)


class TextVAE(nn.Module):
    """Encoder and decoder. Latents outside this module are always the normalized ones."""

    def __init__(self, config: TextVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextVAEEncoder(config)
        self.decoder = TextVAEDecoder(config)

    @property
    def mask_token_id(self) -> int:
        """The [mask] id of the BERT loss: the embedding's extra row."""
        return self.config.vocab_size

    def encode(self, tokens: Tokens, document: Documents = None) -> Posterior:
        """q_phi(z0 | x)."""
        return self.encoder(tokens, document)

    def decode(self, z_0: Latents, document: Documents = None) -> Float[Tensor, "batch seq vocab"]:
        """Logits of p_theta(x | z0), all positions in parallel."""
        return self.decoder.head(self.decoder(z_0, document))

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for decoding `capacity` latents a row block by block."""
        return self._cache(self.config.decoder_num_blocks, batch, capacity)

    def new_encoder_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for encoding `capacity` latents a row block by block."""
        return self._cache(self.config.encoder_num_blocks, batch, capacity)

    def _cache(self, num_blocks: int, batch: int, capacity: int) -> KVCache:
        config, like = self.config, self.decoder.in_layer.weight
        heads, head_dim = config.num_heads, config.dim // config.num_heads
        return KVCache(num_blocks, batch, capacity, heads, head_dim, like)


def _rows_of(config: TextVAEConfig) -> tuple[int, float, int]:
    """Width of a head, base of RoPE and positions of a block, as `through_blocks` takes them."""
    return config.dim // config.num_heads, config.rope_theta, config.block_size

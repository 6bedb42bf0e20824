"""The block-causal DiT v_psi(z_t, t): in names and arithmetic the released one, or with codes."""

import dataclasses
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cola_train.models.attention.cached import KVCache
from cola_train.models.attention.masks import packed, row_positions
from cola_train.models.attention.rows import Attention, LayerAttention
from cola_train.models.attention.tiled import packed_attention
from cola_train.models.blocks import Block, HasBuffers, HasStacks, TimeModule
from cola_train.models.code_embedding import CodeEmbedding
from cola_train.models.codebook_head import CodebookHead
from cola_train.models.config import DiTConfig
from cola_train.models.layers import (
    CosSin,
    Hidden,
    apply_rope_interleaved,
    interleaved_cos_sin,
    rotary_frequencies,
    sinusoidal_time,
)
from cola_train.models.modulation import (
    BlockModulation,
    DiTModulation,
    Modulations,
    Times,
    ada_layer,
)

DIT_TIME_SCALE = 1000.0  # T: the network reads 1000 t, the rest of the project t in [0, 1]
_TIME_FREQUENCIES = 128


class _Rope(HasBuffers):
    """Holds the released `rope.rope.freqs` buffer."""

    freqs: Tensor

    def __init__(self, rope_dim: int) -> None:
        super().__init__()
        self.rope_dim = rope_dim
        self.register_buffer("freqs", rotary_frequencies(rope_dim, 10000.0))

    def reset_buffers(self) -> None:
        self.freqs.copy_(rotary_frequencies(self.rope_dim, 10000.0))


class DiTAttention(HasStacks):
    """Attention with LayerNorm on each head's q and k; RoPE on the first rope_dim channels."""

    stacks: ClassVar = {"proj_qkv": 3}

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.proj_qkv = nn.Linear(config.txt_dim, 3 * inner, bias=config.qk_bias)
        self.proj_out = nn.Linear(inner, config.txt_dim, bias=config.qk_bias)
        self.norm_q = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.norm_k = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.rope = nn.ModuleDict({"rope": _Rope(config.rope_dim)})

    def forward(
        self, x: Hidden, cos_sin: CosSin, attention: LayerAttention, outputs: int
    ) -> Float[Tensor, "batch outputs dim"]:
        """Attend over what `attention` says; only the first `outputs` positions have queries."""
        if outputs == x.shape[1]:
            q, k, v = self.proj_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        else:
            q, k, v = self._few_queries(x, outputs)
        q = apply_rope_interleaved(self.norm_q(q), cos_sin[:, :outputs]).to(v.dtype)
        k = apply_rope_interleaved(self.norm_k(k), cos_sin).to(v.dtype)
        attended = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj_out(attended.transpose(1, 2).flatten(2))

    def _few_queries(self, x: Tensor, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias = self.proj_qkv.weight, self.proj_qkv.bias
        inner = weight.shape[0] // 3
        bias_q, bias_kv = (None, None) if bias is None else (bias[:inner], bias[inner:])
        q = F.linear(x[:, :outputs], weight[:inner], bias_q).unflatten(-1, (self.heads, -1))
        k, v = F.linear(x, weight[inner:], bias_kv).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return q, k, v


class DiTMLP(nn.Module):
    """GELU (tanh form) feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = config.txt_dim * config.expand_ratio
        self.proj_in = nn.Linear(config.txt_dim, hidden)
        self.proj_out = nn.Linear(hidden, config.txt_dim)

    def forward(self, x: Hidden) -> Hidden:
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


class DiTBlock(Block):
    """x = x + gate attention(LN(x)(1 + scale) + shift), then so with the MLP; LN without affine."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.msa, self.mlp = DiTAttention(config), DiTMLP(config)
        self.ada = DiTModulation(config.txt_dim)

    def forward(
        self,
        x: Hidden,
        times: Float[Tensor, "times dim"] | BlockModulation,
        index: Int[Tensor, "#batch #seq"],
        cos_sin: CosSin,
        attention: LayerAttention,
        outputs: int,
    ) -> Float[Tensor, "batch outputs dim"]:
        """One block, at positions whose times `index` picks: embeddings, or what `ada` returns.

        Only the first `outputs` results are read; all positions give keys and values.
        """
        modulation = times if isinstance(times, BlockModulation) else self.ada(times)
        h = _modulate(self._norm(x), modulation.msa_in, index)
        x, index = x[:, :outputs], index[:, :outputs]
        x = torch.addcmul(
            x, F.embedding(index, modulation.msa_out), self.msa(h, cos_sin, attention, outputs)
        )
        h = _modulate(self._norm(x), modulation.mlp_in, index)
        return torch.addcmul(x, F.embedding(index, modulation.mlp_out), self.mlp(h))

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.config.txt_dim,), eps=self.config.norm_eps)


def _modulate(x: Tensor, shift_and_scale: Tensor, index: Tensor) -> Tensor:
    shift, scale = shift_and_scale.chunk(2, dim=-1)
    # In bf16, 1 + scale would lose a small scale: next to 1 its steps are 1/128.
    factor = 1 + scale.float()
    # The backward of an embedding look-up is far cheaper than that of indexing.
    return torch.addcmul(F.embedding(index, shift), x, F.embedding(index, factor))


class _Projection(nn.Module):
    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width_in, width_out)


class _TimeEmbedding(TimeModule):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(2 * _TIME_FREQUENCIES, config.txt_dim)
        self.proj_hid = nn.Linear(config.txt_dim, config.txt_dim)
        self.proj_out = nn.Linear(config.txt_dim, config.emb_dim)

    def forward(self, t: Float[Tensor, " times"]) -> Float[Tensor, "times dim"]:
        x = sinusoidal_time(DIT_TIME_SCALE * t, _TIME_FREQUENCIES)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(x)))))


class _OutModulation(TimeModule):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.out_in = ada_layer(config.emb_dim, 2 * config.txt_dim)


class BlockCausalDiT(nn.Module):
    """The prior's velocity field. t = 0 is data and t = 1 is noise."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.txt_in = _Projection(config.txt_in_channels, config.txt_dim)
        self.emb_in = _TimeEmbedding(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.txt_out_norm = nn.LayerNorm(config.txt_dim, eps=config.norm_eps)
        self.txt_out_ada = _OutModulation(config)
        self.codebook: CodebookHead | None = None
        self.code_embedding: CodeEmbedding | None = None
        if config.head == "codebook":
            assert config.vocab_size is not None
            channels = config.txt_out_channels
            self.codebook = CodebookHead(config.txt_dim, channels, config.vocab_size)
            if config.embeds_codes:
                self.code_embedding = CodeEmbedding(config.txt_dim, config.vocab_size)
        else:
            self.txt_out = _Projection(config.txt_dim, config.txt_out_channels)

    def modulations(self, t: Float[Tensor, " times"]) -> Modulations:
        """What the adaLN layers give for each of these times, for any number of passes."""
        embedding = self.emb_in(t)
        blocks = tuple(block.ada(embedding) for block in self._blocks())
        return Modulations(blocks, self.txt_out_ada.out_in(embedding))

    def forward(
        self,
        latents: Float[Tensor, "batch seq channels"],
        times: Times,
        positions: Int[Tensor, "#batch seq"],
        attention: Attention,
        outputs: int | None = None,
        targets: Int[Tensor, "batch outputs"] | None = None,
    ) -> Any:
        """Velocity (batch, outputs, channels) at the first `outputs` positions, or at all; in fp32.

        Latents are normalized ones, clean or noised, `positions` RoPE's. The last block computes no
        more than `outputs` velocities need. With `targets` also -log p of these tokens, nats
        (batch, outputs), by the codebook.
        """
        blocks, count = self._blocks(), latents.shape[1] if outputs is None else outputs
        x, known = self._read(latents, times), times.modulations
        embedding = self.emb_in(times.distinct) if known is None else None
        frequencies = cast(_Rope, blocks[0].msa.rope["rope"]).freqs
        cos_sin = interleaved_cos_sin(positions, frequencies, self.config.head_dim)
        for layer, block in enumerate(blocks):
            modulation = embedding if known is None else known.blocks[layer]
            read = count if layer == len(blocks) - 1 else x.shape[1]
            x = block(x, modulation, times.index, cos_sin, attention.layer(layer), read)
        last = self.txt_out_ada.out_in(embedding) if known is None else known.out
        index = times.index[:, :count]
        x = _modulate(self.txt_out_norm(x), last, index)
        if self.codebook is None:
            return self.txt_out.proj(x).float()
        t = times.distinct[index].expand(x.shape[:2])
        velocity, nats = self.codebook(x, latents[:, :count], t, targets)
        return velocity if targets is None else (velocity, nats)

    def _read(self, latents: Tensor, times: Times) -> Tensor:
        x: Tensor = self.txt_in.proj(latents)
        if self.codebook is None or self.code_embedding is None:
            return x
        is_clean = (times.distinct == 0)[times.index].expand(x.shape[:2])
        return x + self.code_embedding(latents, is_clean, self.codebook.book)

    def _blocks(self) -> list[DiTBlock]:
        return cast(list[DiTBlock], list(self.blocks))

    def velocity(
        self,
        z_t: Float[Tensor, "batch noised channels"],
        history: Float[Tensor, "batch latents channels"],
        times: Times,
        document: Int[Tensor, "batch latents"] | None = None,
        sees_history: Bool[Tensor, "batch noised"] | None = None,
    ) -> Float[Tensor, "batch noised channels"]:
        """The packed training pass: each noised block given its clean history, a row's at once.

        z_t are noised latents, pinned prompt positions clean, of the row's copies one by one; in
        their times the last distinct one must be 0, which clean history gets. The last block of
        `history`, clean latents z_0^(<b), is never history and is dropped here. `document` keeps
        documents apart and restarts positions; history is hidden where `sees_history` is False.
        """
        velocity: Tensor = self._packed(z_t, history, times, document, sees_history, None)
        return velocity

    def velocity_and_nats(
        self,
        z_t: Float[Tensor, "batch noised channels"],
        history: Float[Tensor, "batch latents channels"],
        times: Times,
        targets: Int[Tensor, "batch noised"],
        document: Int[Tensor, "batch latents"] | None = None,
        sees_history: Bool[Tensor, "batch noised"] | None = None,
    ) -> tuple[Float[Tensor, "batch noised channels"], Float[Tensor, "batch noised"]]:
        """`velocity`, and -log p(token | z_t, history) of `targets` by the codebook, nats."""
        velocity, nats = self._packed(z_t, history, times, document, sees_history, targets)
        return velocity, nats

    def _packed(
        self,
        z_t: Tensor,
        history: Tensor,
        times: Times,
        document: Tensor | None,
        sees_history: Tensor | None,
        targets: Tensor | None,
    ) -> Any:
        rows, num_noised = z_t.shape[:2]
        num_latents, block_size = history.shape[1], self.config.block_size
        num_clean, copies = num_latents - block_size, num_noised // num_latents
        positions = row_positions(num_latents, document, z_t.device)
        clean = times.index.new_full((rows, num_clean), times.distinct.shape[0] - 1)
        return self(
            torch.cat([z_t, history[:, :num_clean]], dim=1),
            dataclasses.replace(times, index=torch.cat([times.index, clean], dim=1)),
            packed(positions, positions[:, :num_clean], copies),
            packed_attention(num_latents, block_size, document, sees_history, z_t.device, copies),
            outputs=num_noised,
            targets=targets,
        )

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` latents a row."""
        config, weight = self.config, self.txt_in.proj.weight
        return KVCache(config.num_layers, batch, capacity, config.heads, config.head_dim, weight)

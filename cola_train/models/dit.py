"""The block-causal DiT v_psi(z_t, t): parameter names and arithmetic are the released format's."""

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from cola_train.config.models import DiTConfig
from cola_train.models.attention import Attention, KVCache, RowAttention
from cola_train.models.layers import Rotation, rotary_frequencies, rotate_interleaved, rotation, sinusoidal_time
from cola_train.models.masks import document_positions, packed_places

DIT_TIME_SCALE = 1000.0  # T: the network reads 1000 t, the rest of the project t in [0, 1]
_TIME_FREQUENCIES = 128


@dataclasses.dataclass(frozen=True)
class Times:
    """The time of each position, held as the distinct times and an index into them.

    The adaLN layers are a third of the DiT's weights and depend on t alone: they run once per distinct time.
    """

    distinct: Float[Tensor, " times"]
    index: Int[Tensor, "batch seq"]

    def gather(self, per_time: Float[Tensor, "times width"]) -> Float[Tensor, "batch seq width"]:
        """A value per distinct time, laid out per position."""
        # The backward of an embedding look-up is far cheaper than that of indexing.
        return F.embedding(self.index, per_time)


class _Rope(nn.Module):
    """Holds the released `rope.rope.freqs` buffer."""

    freqs: Tensor

    def __init__(self, rope_dim: int) -> None:
        super().__init__()
        self.rope_dim = rope_dim
        self.register_buffer("freqs", rotary_frequencies(rope_dim, 10000.0))

    def reset_buffers(self) -> None:
        self.freqs.copy_(rotary_frequencies(self.rope_dim, 10000.0))


class _AttentionRope(nn.Module):
    def __init__(self, rope_dim: int) -> None:
        super().__init__()
        self.rope = _Rope(rope_dim)


class DiTAttention(nn.Module):
    """Attention with per-head LayerNorm on q and k, and interleaved RoPE on the first rope_dim channels."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, inner = config.heads, config.heads * config.head_dim
        self.proj_qkv = nn.Linear(config.txt_dim, 3 * inner, bias=config.qk_bias)
        self.proj_out = nn.Linear(inner, config.txt_dim, bias=config.qk_bias)
        self.norm_q = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.norm_k = nn.LayerNorm(config.head_dim, eps=config.norm_eps)
        self.rope = _AttentionRope(config.rope_dim)

    def forward(
        self, x: Float[Tensor, "batch seq dim"], turn: Rotation, attention: Attention, layer: int
    ) -> Float[Tensor, "batch seq dim"]:
        """Attend over what `attention` offers `layer`."""
        q, k, v = self.proj_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotate_interleaved(self.norm_q(q), turn).to(v.dtype)
        k = rotate_interleaved(self.norm_k(k), turn).to(v.dtype)
        return self.proj_out(attention(layer, q, k, v).transpose(1, 2).flatten(2))


class DiTMLP(nn.Module):
    """GELU (tanh form) feed-forward."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = config.txt_dim * config.expand_ratio
        self.proj_in = nn.Linear(config.txt_dim, hidden)
        self.proj_out = nn.Linear(hidden, config.txt_dim)

    def forward(self, x: Float[Tensor, "batch seq dim"]) -> Float[Tensor, "batch seq dim"]:
        """Position-wise."""
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


def _ada(dim: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, width))


class DiTModulation(nn.Module):
    """adaLN: (shift, scale) before attention and MLP, a gate after each, with no activation on any of them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.msa_in, self.mlp_in = _ada(dim, 2 * dim), _ada(dim, 2 * dim)
        self.msa_out, self.mlp_out = _ada(dim, dim), _ada(dim, dim)


class DiTBlock(nn.Module):
    """x = x + gate attention(LN(x)(1 + scale) + shift), then the same with the MLP; LN without affine."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.msa = DiTAttention(config)
        self.mlp = DiTMLP(config)
        self.ada = DiTModulation(config.txt_dim)

    def forward(
        self,
        x: Float[Tensor, "batch seq dim"],
        embedding: Float[Tensor, "times dim"],
        times: Times,
        turn: Rotation,
        attention: Attention,
        layer: int,
    ) -> Float[Tensor, "batch seq dim"]:
        """One block; `embedding` is the time embedding of each distinct time."""
        h = _modulate(self._norm(x), self.ada.msa_in(embedding), times)
        x = x + times.gather(self.ada.msa_out(embedding)) * self.msa(h, turn, attention, layer)
        h = _modulate(self._norm(x), self.ada.mlp_in(embedding), times)
        return cast(Tensor, x + times.gather(self.ada.mlp_out(embedding)) * self.mlp(h))

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.config.txt_dim,), eps=self.config.norm_eps)


def _modulate(x: Tensor, shift_and_scale: Tensor, times: Times) -> Tensor:
    shift, scale = times.gather(shift_and_scale).chunk(2, dim=-1)
    return x * (1 + scale) + shift


class _LatentIn(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.txt_in_channels, config.txt_dim)


class _LatentOut(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(config.txt_dim, config.txt_out_channels)


class _TimeEmbedding(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(2 * _TIME_FREQUENCIES, config.txt_dim)
        self.proj_hid = nn.Linear(config.txt_dim, config.txt_dim)
        self.proj_out = nn.Linear(config.txt_dim, config.emb_dim)

    def forward(self, t: Float[Tensor, " times"]) -> Float[Tensor, "times dim"]:
        x = sinusoidal_time(DIT_TIME_SCALE * t, _TIME_FREQUENCIES)
        return self.proj_out(F.silu(self.proj_hid(F.silu(self.proj_in(x)))))


class _OutModulation(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.out_in = _ada(config.emb_dim, 2 * config.txt_dim)


class BlockCausalDiT(nn.Module):
    """The prior's velocity field. t = 0 is data and t = 1 is noise."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.txt_in = _LatentIn(config)
        self.emb_in = _TimeEmbedding(config)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.num_layers))
        self.txt_out_norm = nn.LayerNorm(config.txt_dim, eps=config.norm_eps)
        self.txt_out_ada = _OutModulation(config)
        self.txt_out = _LatentOut(config)

    def forward(
        self,
        latents: Float[Tensor, "batch seq channels"],
        times: Times,
        positions: Int[Tensor, "#batch seq"],
        attention: Attention,
    ) -> Float[Tensor, "batch seq channels"]:
        """Velocity at every position, in fp32.

        Args:
            latents: normalised latents, clean or noised.
            times: the time of each position, in [0, 1].
            positions: RoPE position of each.
            attention: what each layer attends over.
        """
        x = self.txt_in.proj(latents)
        embedding = self.emb_in(times.distinct)
        turn = rotation(positions, cast(DiTBlock, self.blocks[0]).msa.rope.rope.freqs)
        for layer, block in enumerate(self.blocks):
            x = block(x, embedding, times, turn, attention, layer)
        x = _modulate(self.txt_out_norm(x), self.txt_out_ada.out_in(embedding), times)
        return self.txt_out.proj(x).float()

    def velocity(
        self,
        z_t: Float[Tensor, "batch latents channels"],
        history: Float[Tensor, "batch latents channels"],
        times: Times,
        document: Int[Tensor, "batch latents"] | None = None,
        sees_history: Tensor | None = None,
    ) -> Float[Tensor, "batch latents channels"]:
        """The packed training pass: every noised block given its clean history, all blocks of a row at once.

        Args:
            z_t: noised latents (pinned prompt positions clean among them).
            history: clean latents z_0^(<b); the last block is never history and is dropped here.
            times: the times of `z_t`; the last distinct one must be 0, which clean history gets.
            document: document of each latent; keeps documents apart and restarts positions.
            sees_history: (batch, latents), False where history is hidden.
        """
        num_latents, block_size = z_t.shape[1], self.config.block_size
        num_clean = num_latents - block_size
        places = packed_places(num_latents, block_size, document, sees_history, z_t.device)
        positions = torch.arange(num_latents, device=z_t.device)[None] if document is None else document_positions(document)
        clean = times.index.new_full((z_t.shape[0], num_clean), times.distinct.shape[0] - 1)
        out: Tensor = self(
            torch.cat([history[:, :num_clean], z_t], dim=1),
            Times(times.distinct, torch.cat([clean, times.index], dim=1)),
            torch.cat([positions[:, :num_clean], positions], dim=1),
            RowAttention.from_places(places),
        )
        return out[:, num_clean:]

    def reset_buffers(self) -> None:
        """Compute all buffers again, for a network built on the meta device."""
        for block in self.blocks:
            cast(DiTBlock, block).msa.rope.rope.reset_buffers()

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache for `capacity` latents a row."""
        config, weight = self.config, self.txt_in.proj.weight
        return KVCache(config.num_layers, batch, capacity, config.heads, config.head_dim, weight.device, weight.dtype)

"""The two kinds of rotary embedding, and the sinusoidal time embedding; fp32 for any input type."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Cosine and signed sine for each channel of a head, at [..., 0, :] and [..., 1, :]: x turns into
# x cos + partner(x) sin.
CosSin = Float[Tensor, "#batch seq 2 head_dim"]
Hidden = Float[Tensor, "batch seq dim"]  # the residual stream, and what a block adds to it


def rotary_frequencies(dim: int, base: float) -> Float[Tensor, " half"]:
    """base^(-2i/dim) for i < dim/2, radians per position."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def interleaved_cos_sin(
    positions: Int[Tensor, "#batch seq"], frequencies: Float[Tensor, " half"], head_dim: int
) -> CosSin:
    """For `apply_rope_interleaved`, once for all layers; channels beyond 2 x half do not rotate."""
    angle = positions[..., None].float() * frequencies.float()
    cos = angle.cos().repeat_interleave(2, dim=-1)
    sin = torch.stack([-angle.sin(), angle.sin()], dim=-1).flatten(-2)
    rest = head_dim - cos.shape[-1]
    return torch.stack([F.pad(cos, (0, rest), value=1.0), F.pad(sin, (0, rest))], dim=-2)


def half_cos_sin(positions: Int[Tensor, "#batch seq"], head_dim: int, base: float) -> CosSin:
    """For `apply_rope_half`, once for all layers."""
    angle = positions[..., None].float() * rotary_frequencies(head_dim, base).to(positions.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=-2)


def apply_rope_half(
    x: Float[Tensor, "batch seq heads head_dim"], cos_sin: CosSin
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Rotate queries or keys in the VAE's form: channel i pairs with channel i + head_dim/2."""
    return _rotate(x, x.roll(x.shape[-1] // 2, dims=-1), cos_sin)


def apply_rope_interleaved(
    x: Float[Tensor, "batch seq heads head_dim"], cos_sin: CosSin
) -> Float[Tensor, "batch seq heads head_dim"]:
    """Rotate queries or keys in the DiT's form: channels 2i and 2i + 1 pair."""
    return _rotate(x, x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), cos_sin)


def _rotate(x: Tensor, partner: Tensor, cos_sin: CosSin) -> Tensor:
    cos, sin = cos_sin[:, :, None].unbind(-2)
    return torch.addcmul(x.float() * cos, partner.float(), sin).to(x.dtype)


def sinusoidal_time(
    t: Float[Tensor, " times"], num_frequencies: int = 128
) -> Float[Tensor, "times embedding"]:
    """[sin(t w), cos(t w)] of t in [0, 1000], w_i = exp(-ln(10000) i / num_frequencies)."""
    steps = torch.arange(num_frequencies, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / num_frequencies * steps)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)

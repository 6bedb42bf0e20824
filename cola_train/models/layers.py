"""The two kinds of rotary embedding, and the sinusoidal time embedding. All in fp32, whatever the inputs' type."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

Rotation = tuple[Float[Tensor, "#batch seq half"], Float[Tensor, "#batch seq half"]]


def rotary_frequencies(dim: int, base: float) -> Float[Tensor, " half"]:
    """base^(-2i/dim) for i < dim/2, radians per position."""
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotation(positions: Int[Tensor, "#batch seq"], frequencies: Float[Tensor, " half"]) -> Rotation:
    """Cosine and sine of position times frequency, once for all layers."""
    angle = positions[..., None].float() * frequencies.float()
    return angle.cos(), angle.sin()


def rotate_half(x: Float[Tensor, "batch heads seq dim"], turn: Rotation) -> Float[Tensor, "batch heads seq dim"]:
    """The VAE's form: channel i pairs with channel i + dim/2."""
    cos, sin = turn[0].unsqueeze(1), turn[1].unsqueeze(1)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rotate_interleaved(x: Float[Tensor, "batch heads seq dim"], turn: Rotation) -> Float[Tensor, "batch heads seq dim"]:
    """The DiT's form: channels 2i and 2i + 1 pair; channels beyond 2 x half pass through."""
    cos, sin = turn[0].unsqueeze(1), turn[1].unsqueeze(1)
    rope_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rope_dim], x[..., rope_dim:]
    a, b = rotated.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)
    return torch.cat([turned, rest], dim=-1)


def sinusoidal_time(t: Float[Tensor, " times"], num_frequencies: int = 128) -> Float[Tensor, "times embedding"]:
    """[sin(t w), cos(t w)] with w_i = exp(-ln(10000) i / num_frequencies); t in [0, 1000], embedding = 2 x num_frequencies."""
    steps = torch.arange(num_frequencies, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000.0) / num_frequencies * steps)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)

"""A plain DiT that begins as a denoiser of bits, written into its tensors.

With a latent's bits independent, each +-a_j in channels j and j + n (codes.py),

    E[z_0 | z_t] = mean code, of a bit: a_j tanh(log_odds_j / 2 + (1 - t) a_j (z_j - z_(j+n)) / V)
    v = slope z_t - ((1 - t) slope + 1) mean code          V, slope: models/codebook.py

which a DiT has layers for. The residual stream carries z_t, a constant that makes LayerNorm's
factor one of t alone, and the mean code. adaLN of the last block's MLP gives (1 - t) / V, two GELU
units a bit give tanh, and the last adaLN gives slope. No block adds anything else yet: what the
history tells, and bits tell of each other, is there to be learned.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from cola_train.families.cola.bits.codes import BitCodes
from cola_train.families.cola.bits.sizes import UNITS_PER_BIT, least_width
from cola_train.models.config import DiTConfig
from cola_train.models.dit import DIT_TIME_SCALE
from cola_train.models.layers import sinusoidal_time

# tanh(x) is near (gelu(b x + g) - gelu(b x - g)) / g - 1. Closer sums of more units learn worse:
# whatever tells of a bit has to move all of its units at once.
_SLOPE, _OFFSET = 1.7288, 2.5
# The released time embedding has waves of up to 1000 radians, among which a small network finds no
# smooth function of t. Those above this many do not reach it at first.
_MOST_RADIANS = 40.0
_KEPT_GAIN = 1.6  # makes up for the waves that are left out
_GRID = 4001  # times at which adaLN is fitted
_RIDGE = 1e-10
# No logit needs more: beyond, tanh is 1.
_LARGEST_SCALE = 12.0

Curve = Float64[Tensor, " times"]  # a function of t, on the grid
Draw = Callable[[str, torch.Size], Tensor]


class BitDenoiser:
    """The tensors of a DiT that denoises `codes`, of latents with noise exp(-log_snr)."""

    def __init__(
        self,
        config: DiTConfig,
        codes: BitCodes,
        log_snr: float,
        shapes: dict[str, torch.Size],
        draw: Draw,
    ) -> None:
        self._config, self._codes, self._shapes, self._drawn = config, codes, shapes, draw
        self._channels, self._width = config.txt_in_channels, config.txt_dim
        self._read = slice(0, self._channels)
        self._constant = slice(self._channels, self._channels + 2)
        self._mean = slice(self._channels + 2, least_width(self._channels))
        t = torch.linspace(0, 1, _GRID, dtype=torch.float64)
        spread = math.exp(-log_snr)
        noised = (1 - t).square() * spread + t.square()
        slope = (t - (1 - t) * spread) / noised
        before, after = self._lengths(t, noised, spread)
        scale = ((1 - t) / noised * before).clamp(max=_LARGEST_SCALE)
        wanted = torch.stack([scale, slope * after, (slope * (1 - t) + 1) * after], dim=1)
        self._fit(t, wanted - 1)

    def value(self, name: str) -> Tensor:
        """The tensor of that name."""
        value, last = self._draw(name), f"blocks.{self._config.num_layers - 1}."
        write = {
            "txt_in.proj.weight": self._write_input,
            "txt_in.proj.bias": self._write_constant,
            f"{last}ada.mlp_in.1.weight": self._write_logit_scale,
            f"{last}ada.mlp_in.1.bias": self._write_logit_scale,
            f"{last}ada.mlp_out.1.bias": self._open_gate,
            f"{last}mlp.proj_in.weight": self._write_logits,
            f"{last}mlp.proj_in.bias": self._write_log_odds,
            f"{last}mlp.proj_out.weight": self._write_tanh,
            f"{last}mlp.proj_out.bias": self._write_tanh_end,
            "txt_out_ada.out_in.1.weight": self._write_velocity_scale,
            "txt_out_ada.out_in.1.bias": self._write_velocity_scale,
            "txt_out.proj.weight": self._write_velocity,
        }.get(name)
        if write is not None:
            write(value)
        return value

    def _draw(self, name: str) -> Tensor:
        value = self._drawn(name, self._shapes[name])
        if name == "emb_in.proj_in.weight":
            half = value.shape[1] // 2
            radians = DIT_TIME_SCALE * torch.exp(-math.log(10000.0) / half * torch.arange(half))
            value *= _KEPT_GAIN * (radians < _MOST_RADIANS).float().repeat(2)
        return value

    def _lengths(self, t: Curve, noised: Curve, spread: float) -> tuple[Curve, Curve]:
        """LayerNorm's root mean squares before the last MLP and after it, by time."""
        drawn = self._draw("txt_in.proj.weight")[self._mean.stop :].double().square().sum()
        latent = (1 - t).square() * (1 + spread) + t.square()
        of_noise = latent * (self._channels + drawn) + 2 * self._height**2
        # A logit is N(m, m) where the bit is +1. Means by Gauss and Hermite.
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        mean = 2 * ((1 - t) * self._codes.amplitude.double()[:, None]).square() / noised
        logit = mean[..., None] + mean.sqrt()[..., None] * torch.from_numpy(nodes)
        square = logit.tanh().square() @ torch.from_numpy(weights / weights.sum())
        of_codes = 2 * square.sum(0)
        return (of_noise / self._width).sqrt(), ((of_noise + of_codes) / self._width).sqrt()

    @property
    def _height(self) -> float:
        return math.sqrt(self._channels / 2)

    def _fit(self, t: Curve, curves: Float64[Tensor, "times curves"]) -> None:
        """Linear layers from the time embedding to `curves`, by ridge regression."""
        x = sinusoidal_time(DIT_TIME_SCALE * t)
        for layer in ("proj_in", "proj_hid", "proj_out"):
            name = f"emb_in.{layer}"
            x = F.silu(F.linear(x, self._draw(f"{name}.weight"), self._draw(f"{name}.bias")))
        features = torch.cat([x.double(), torch.ones(len(t), 1, dtype=torch.float64)], dim=1)
        ridge = _RIDGE * len(t) * torch.eye(features.shape[1], dtype=torch.float64)
        found = torch.linalg.solve(features.T @ features + ridge, features.T @ curves)
        self._weights, self._biases = found[:-1].T.float(), found[-1].float()

    def _write_input(self, weight: Tensor) -> None:
        weight[: self._mean.stop] = 0
        weight[self._read] = torch.eye(self._channels)

    def _write_constant(self, bias: Tensor) -> None:
        bias[self._constant] = torch.tensor([self._height, -self._height])

    def _write_logit_scale(self, value: Tensor) -> None:
        # The first half of an adaLN layer's outputs are shifts, the second scales less 1.
        fitted = self._weights if value.ndim == 2 else self._biases
        value[self._width :][self._read] = fitted[0]

    def _open_gate(self, bias: Tensor) -> None:
        bias[self._mean] = 1

    def _units(self) -> list[tuple[slice, float]]:
        """Hidden units of all bits, and the sign of their offset: two a bit."""
        bits = len(self._codes.amplitude)
        return [(slice(0, bits), 1.0), (slice(bits, UNITS_PER_BIT * bits), -1.0)]

    def _write_logits(self, weight: Tensor) -> None:
        loud = self._codes.amplitude.diag()
        for units, _ in self._units():
            weight[units] = 0
            weight[units, self._read] = _SLOPE * torch.cat([loud, -loud], dim=1)

    def _write_log_odds(self, bias: Tensor) -> None:
        for units, sign in self._units():
            bias[units] = _SLOPE * self._codes.log_odds / 2 + sign * _OFFSET

    def _write_tanh(self, weight: Tensor) -> None:
        weight[self._mean] = 0
        both = torch.eye(self._channels // 2)
        for units, sign in self._units():
            weight[self._mean, units] = sign / _OFFSET * torch.cat([both, -both])

    def _write_tanh_end(self, bias: Tensor) -> None:
        both = torch.ones(self._channels // 2)
        bias[self._mean] = torch.cat([-both, both])

    def _write_velocity_scale(self, value: Tensor) -> None:
        fitted, scales = (self._weights if value.ndim == 2 else self._biases), value[self._width :]
        scales[self._read], scales[self._mean] = fitted[1], fitted[2]

    def _write_velocity(self, weight: Tensor) -> None:
        weight[:, self._read] = torch.eye(self._channels)
        weight[:, self._mean] = -torch.cat([self._codes.amplitude] * 2).diag()

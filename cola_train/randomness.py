"""Every random draw as a pure function of (seed, purpose, sample index, position).

Draws are addressed, not taken from a stream: a counter-based generator (Philox4x32-10, Salmon et
al. 2011) turns the address into bits with integer arithmetic, so a sample gets the same draws on
any device, on any number of processes, in any micro-batch and after any resume. Normals go through
float64 and are rounded once, which hides the last-place differences between devices.
"""

import enum
import math
import zlib

import torch
from jaxtyping import Float, Int
from torch import Tensor

PerSample = Int[Tensor, " batch"]
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Purpose(enum.IntEnum):
    """What a draw is for. The numbers identify runs' draws: never reuse or renumber one."""

    POSTERIOR_EPS = 1
    MASKED_POSTERIOR_EPS = 2
    TOKEN_MASK = 3
    FLOW_NOISE = 4
    FLOW_TIME = 5
    PROMPT_BLOCK = 6
    PROMPT_LENGTH = 7
    HISTORY_DROPOUT = 8
    SAMPLER_NOISE = 9
    SAMPLER_TOKEN = 10
    WEIGHTS = 11
    DIFFUSION_TIME = 12
    DIFFUSION_MASK = 13
    LIKELIHOOD_EPS = 14
    LIKELIHOOD_PROBE = 15
    LIKELIHOOD_LEVEL = 21
    LIKELIHOOD_NOISE = 22
    LIKELIHOOD_PATH = 23


def uniform(
    seed: int, purpose: Purpose, sample_index: PerSample, count: int, start: int | PerSample = 0
) -> Float[Tensor, "batch count"]:
    """`count` float32 draws in [0, 1) for each sample, on `sample_index`'s device.

    `start` skips that many, a multiple of 4: the same for all samples, or each its own.
    """
    bits = _bits(seed, purpose, sample_index, -(-count // 4), start)
    # 24 bits fill a float32's mantissa: the largest draw stays below 1.
    return ((bits >> 8).float() * 2.0**-24)[:, :count]


def normal(
    seed: int, purpose: Purpose, sample_index: PerSample, count: int, start: int | PerSample = 0
) -> Float[Tensor, "batch count"]:
    """`count` float32 draws from N(0, 1) for each sample (Box-Muller); `start` as in `uniform`."""
    bits = _bits(seed, purpose, sample_index, -(-count // 4), start).double()
    u1, u2 = ((bits + 0.5) * 2.0**-32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(u1)), 2 * math.pi * u2
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return pairs.flatten(1)[:, :count].float()


def round_up_to_draws(count: int) -> int:
    """The next multiple of 4: where the draws after `count` of them can `start`."""
    return -(-count // 4) * 4


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for a parameter's initial values, the same in any order of building."""
    generator = torch.Generator()
    generator.manual_seed(
        (seed * 0x9E3779B97F4A7C15 + (Purpose.WEIGHTS << 32) + zlib.crc32(name.encode())) % 2**63
    )
    return generator


def _bits(
    seed: int, purpose: Purpose, sample_index: Tensor, blocks: int, start: int | Tensor
) -> Tensor:
    assert isinstance(start, Tensor) or start % 4 == 0
    index = sample_index.to(torch.int64)[:, None]
    first = start[:, None] // 4 if isinstance(start, Tensor) else start // 4
    block = first + torch.arange(blocks, device=index.device, dtype=torch.int64)
    block = block.expand(len(index), -1)
    purposes = torch.full_like(block, int(purpose))
    x2, x3 = (word.expand_as(block) for word in (index & _LOW, (index >> 32) & _LOW))
    return torch.stack(philox4x32((block, purposes, x2, x3), seed), dim=-1).flatten(1)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; the 64-bit `seed` is the key."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # The products overflow int64 and wrap; their 64 bits are right all the same, the sign is
        # masked away.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & _LOW) ^ x1 ^ key0,
            p1 & _LOW,
            ((p0 >> 32) & _LOW) ^ x3 ^ key1,
            p0 & _LOW,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return x0, x1, x2, x3

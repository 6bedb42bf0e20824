"""How large networks must be that are written for latents of bits."""

import math

# GELU units that make a tanh (dit.py).
UNITS_PER_BIT = 2


def bits_for(tokens: int) -> int:
    """How many bits tell so many tokens apart."""
    return max(1, math.ceil(math.log2(tokens)))


def least_units(channels: int) -> int:
    """Hidden units that are written in the last MLP of a DiT on so many channels, two a bit."""
    return UNITS_PER_BIT * channels // 2


def least_width(channels: int) -> int:
    """Channels of its residual stream that are written: latents, a constant, the mean code."""
    return 2 * channels + 2

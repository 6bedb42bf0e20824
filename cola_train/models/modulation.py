"""The times of positions, and what adaLN makes of each distinct one."""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cola_train.models.blocks import TimeModule


class BlockModulation(NamedTuple):
    """What a block's adaLN layers give for each distinct time, without activation functions."""

    msa_in: Float[Tensor, "times two_dim"]  # shift and scale before attention
    msa_out: Float[Tensor, "times dim"]  # the gate after it
    mlp_in: Float[Tensor, "times two_dim"]
    mlp_out: Float[Tensor, "times dim"]


class Modulations(NamedTuple):
    """What all adaLN layers give for each distinct time."""

    blocks: tuple[BlockModulation, ...]
    out: Float[Tensor, "times two_dim"]  # shift and scale of the last norm

    def rounded(self) -> "Modulations":
        """These with 1 + scale rounded to the type that the layers gave, as released."""
        blocks = (
            block._replace(msa_in=_rounded(block.msa_in), mlp_in=_rounded(block.mlp_in))
            for block in self.blocks
        )
        return Modulations(tuple(blocks), _rounded(self.out))


@dataclasses.dataclass(frozen=True)
class Times:
    """The time in [0, 1] of each position, held as the distinct times and an index into them.

    The adaLN layers are a third of the DiT's weights and depend on t alone: they run once per
    distinct time, or not at all where `modulations` of these times are given (samplers' schedules).
    """

    distinct: Float[Tensor, " times"]
    index: Int[Tensor, "#batch #seq"]
    modulations: Modulations | None = None


def _rounded(shift_and_scale: Tensor) -> Tensor:
    shift, scale = shift_and_scale.chunk(2, dim=-1)
    # Exact: fp32 holds the difference of 1 and a number near it that has fewer digits.
    return torch.cat([shift.float(), (1 + scale).float() - 1], dim=-1)


def ada_layer(dim: int, width: int) -> nn.Sequential:
    """What makes `width` shifts, scales or gates of a time's embedding."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, width))


class DiTModulation(TimeModule):
    """adaLN: (shift, scale) before attention and MLP and a gate after each, without activations."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.msa_in, self.mlp_in = ada_layer(dim, 2 * dim), ada_layer(dim, 2 * dim)
        self.msa_out, self.mlp_out = ada_layer(dim, dim), ada_layer(dim, dim)

    def forward(self, embedding: Float[Tensor, "times dim"]) -> BlockModulation:
        """What modulates a block at each distinct time, from the time's embedding."""
        layers = (self.msa_in, self.msa_out, self.mlp_in, self.mlp_out)
        return BlockModulation(*(layer(embedding) for layer in layers))

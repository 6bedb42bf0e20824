"""Blocks, a pass through them, and what training must know of a network's modules."""

import abc
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from cola_train.models.attention.masks import row_positions
from cola_train.models.attention.rows import Attention
from cola_train.models.attention.tiled import row_attention
from cola_train.models.layers import Hidden, half_cos_sin
from cola_train.models.vocabulary_head import VocabularyHead

_PARTS = ("embedding", "linear", "adaln", "norms", "head")


class Block(nn.Module):
    """What a network repeats in depth: compiled, recomputed, gathered and freed as a whole."""


class TimeModule(nn.Module):
    """What runs once per distinct time and not per position: time embeddings and adaLN.

    Its gradients have a handful of directions and its products a handful of rows, so neither Muon
    nor fp8 is for it.
    """


class HasStacks(nn.Module):
    """A module with linear layers whose weight is several matrices, one below the other.

    They read the same input and are multiplied at once, but they are no one matrix: each is
    orthogonalized by itself.
    """

    stacks: ClassVar[Mapping[str, int]]  # how many equal parts the rows of a layer's weight have


class HasBuffers(nn.Module, abc.ABC):
    """A module with buffers whose values follow from its config."""

    @abc.abstractmethod
    def reset_buffers(self) -> None:
        """Compute all buffers again, for a network built on the meta device."""


def reset_buffers(network: nn.Module) -> None:
    """Give every buffer of a network its value again (`HasBuffers`)."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, HasBuffers):
                module.reset_buffers()


def blocks_of(network: nn.Module) -> Iterator[Block]:
    """Every block of a network, in order."""
    return (module for module in network.modules() if isinstance(module, Block))


def through_blocks(
    blocks: nn.ModuleList,
    x: Hidden,
    head_dim: int,
    rope_theta: float,
    block_size: int,
    document: Int[Tensor, "batch seq"] | None,
    positions: Int[Tensor, "#batch seq"] | None,
    attention: Attention | None,
) -> Hidden:
    """The residual stream x through all blocks of the VAE or a baseline.

    A row is attended as a whole, by blocks of `block_size` positions and within documents, unless a
    sampler gives both RoPE `positions` and what to attend over.
    """
    if attention is None:
        positions = row_positions(x.shape[1], document, x.device)
        attention = row_attention(x.shape[1], block_size, document, x.device)
    assert positions is not None
    cos_sin = half_cos_sin(positions, head_dim, rope_theta)
    for layer, block in enumerate(blocks):
        x = block(x, cos_sin, attention.layer(layer))
    return x


def time_parameters(network: nn.Module) -> set[int]:
    """The ids of the parameters that are used once per time."""
    modules = [module for module in network.modules() if isinstance(module, TimeModule)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def stacked_matrices(network: nn.Module) -> dict[int, int]:
    """How many matrices each stack of a network holds, by its parameter's id (`HasStacks`)."""
    return {
        id(module.get_parameter(f"{layer}.weight")): count
        for module in network.modules()
        if isinstance(module, HasStacks)
        for layer, count in module.stacks.items()
    }


def parameters_by_part(build: Callable[[], nn.Module]) -> dict[str, int]:
    """How many parameters a network has, built on the meta device; absent parts left out.

    `embedding`: token embeddings; `linear`: projections and convolutions; `adaln`: what runs once
    per time; `norms`; `head`: the vocabulary head.
    """
    with torch.device("meta"):
        network = build()
    of_times = time_parameters(network)
    counts: dict[str, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            part = "adaln" if id(parameter) in of_times else _part_of(module)
            counts[part] = counts.get(part, 0) + parameter.numel()
    return {part: counts[part] for part in _PARTS if part in counts}


def _part_of(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, VocabularyHead):
        return "head"
    vectors = all(parameter.ndim == 1 for parameter in module.parameters(recurse=False))
    return "norms" if vectors else "linear"

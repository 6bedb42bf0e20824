"""What training must know of a network's modules: blocks, layers that run once per time, and what
kind a parameter is.
"""

from collections.abc import Iterator

from torch import nn

from cola_train.models.vocabulary_head import VocabularyHead

_PARTS = ("embedding", "linear", "adaln", "norms", "head")


class Block(nn.Module):
    """What a network repeats along its depth: compiled, computed again, gathered and freed as a
    whole.
    """


class TimeModule(nn.Module):
    """What runs once per distinct time and not per position: time embeddings and adaLN.

    Its gradients have a handful of directions and its products a handful of rows, so neither Muon
    nor fp8 is for it.
    """


class HasBuffers(nn.Module):
    """A module with buffers whose values follow from its config."""

    def reset_buffers(self) -> None:
        """Compute all buffers again, for a network built on the meta device."""
        raise NotImplementedError


def blocks_of(network: nn.Module) -> Iterator[Block]:
    """Every block of a network, in order."""
    return (module for module in network.modules() if isinstance(module, Block))


def time_parameters(network: nn.Module) -> set[int]:
    """The ids of the parameters that are used once per time."""
    modules = [module for module in network.modules() if isinstance(module, TimeModule)]
    return {id(parameter) for module in modules for parameter in module.parameters()}


def parameters_by_part(network: nn.Module) -> dict[str, int]:
    """How many parameters a network has, which may be on the meta device.

    `embedding`: token embeddings; `linear`: projections and convolutions; `adaln`: what runs once
    per time; `norms`; `head`: the vocabulary head. Parts that a network lacks are left out.
    """
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
    return (
        "norms"
        if all(parameter.ndim == 1 for parameter in module.parameters(recurse=False))
        else "linear"
    )

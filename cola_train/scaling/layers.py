"""Deep networks recorded as shallow ones: of a stack of equal layers few take part in the step.

What a layer allocates and releases, between its neighbors, does not depend on how many there are
(no block knows its number, models/blocks.py). So the events of an inner layer are repeated for
those that were left out; the tests hold this against recordings of all layers, to the byte.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch.utils._pytree as pytree
from torch import Tensor, nn

from cola_train.models.blocks import Block

Section = tuple[str, str]  # a stack of layers, and which of its passes
# The outer ones have other neighbors, which FSDP2 gathers ahead, and two inner ones must be found
# equal.
KEPT_LAYERS = 5


def shorten(objective: nn.Module, cuts: bool) -> dict[str, int]:
    """Find each stack of equal blocks; with `cuts`, cut it to `KEPT_LAYERS`. Before sharding.

    Returns:
        How many layers were left out, by the stack's path.
    """
    left_out = {}
    for path, stack in objective.named_modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        if all(isinstance(layer, Block) for layer in stack) and len({*map(_shapes, stack)}) == 1:
            left_out[path] = max(0, len(stack) - KEPT_LAYERS) if cuts else 0
            del stack[1 : 1 + left_out[path]]
    return left_out


def _shapes(layer: nn.Module) -> tuple[object, ...]:
    parameters = layer.named_parameters()
    return tuple((name, tensor.shape, tensor.requires_grad) for name, tensor in parameters)


def layer_of(name: str, stacks: Iterable[str]) -> tuple[str, int] | None:
    """The stack and the number of the layer that a parameter or buffer belongs to, if any."""
    for stack in stacks:
        if name.startswith(f"{stack}."):
            return stack, int(name.removeprefix(f"{stack}.").partition(".")[0])
    return None


def note_layers(
    objective: nn.Module, left_out: Mapping[str, int], enter: Callable[[Section, int], None]
) -> None:
    """Call `enter` with section and number where a layer of a cut stack begins a pass."""

    def watch(stack: str, number: int, layer: nn.Module) -> None:
        def after(_: nn.Module, inputs: object, output: object) -> None:
            for tensor in pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda gradient: enter((stack, "backward"), number))

        layer.register_forward_pre_hook(lambda *_: enter((stack, "forward"), number))
        layer.register_forward_hook(after)

    for stack, count in left_out.items():
        for number, layer in enumerate(objective.get_submodule(stack).children()):
            if count > 0:
                watch(stack, number, layer)


class UnequalLayersError(Exception):
    """A stack's layers do not allow that one stands for others."""


def repeated(
    events: Sequence[object],
    entered: Mapping[Section, Sequence[tuple[int, int]]],
    left_out: Mapping[str, int],
) -> npt.NDArray[np.int64]:
    """The events of all layers, as indices into those of the layers that ran.

    `events` are allocations and releases. By section, `entered` tells which layer begins before
    which event; `left_out` tells how many layers of each stack did not run.

    Raises:
        UnequalLayersError: a stack has no two inner layers, one after the other, with the same
            events; or its layers did not run in order, or while another stack's did.
    """
    inner = [
        (start, end, left_out[stack])
        for (stack, _), layers in entered.items()
        if left_out[stack] > 0
        for start, end in _inner_layers(events, layers)
    ]
    order, done = [], 0
    for start, end, times in sorted(inner):
        if start < done:
            raise UnequalLayersError
        order += [np.arange(done, end), *[np.arange(start, end)] * times]
        done = end
    return np.concatenate([*order, np.arange(done, len(events))])


def _inner_layers(
    events: Sequence[object], layers: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """First and last event (exclusive) of an inner layer, for each pass through the stack."""
    for first in range(0, len(layers), KEPT_LAYERS):
        numbers, starts = zip(*layers[first : first + KEPT_LAYERS], strict=True)
        if list(numbers) not in ([*range(KEPT_LAYERS)], [*reversed(range(KEPT_LAYERS))]):
            raise UnequalLayersError
        for start, end, after in zip(starts[1:], starts[2:], starts[3:], strict=False):
            if events[start:end] == events[end:after]:
                yield start, end
                break
        else:
            raise UnequalLayersError

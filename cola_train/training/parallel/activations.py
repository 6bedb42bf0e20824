"""Activation checkpointing: what the backward pass computes again instead of keeping."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cola_train.models.blocks import blocks_of

Checkpointing = Literal["none", "selective", "full"]
_aten = torch.ops.aten
# The costly operations, whose results `selective` keeps: matrix products and attention.
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_mm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def checkpoint_activations(objective: nn.Module, mode: Checkpointing) -> None:
    """Make blocks recompute in the backward pass what `mode` does not keep; before sharding."""
    if mode == "none":
        return
    # Blocks draw no random numbers (dropout is refused): there is no state to restore.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks_of(objective):
        block.forward = _checkpointed(block.forward, options)


@contextlib.contextmanager
def checkpointing_activations(objective: nn.Module, mode: Checkpointing) -> Iterator[None]:
    """As `checkpoint_activations` while the block runs; the objective may be sharded already."""
    checkpoint_activations(objective, mode)
    try:
        yield
    finally:
        for block in blocks_of(objective):
            vars(block).pop("forward", None)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return run


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE

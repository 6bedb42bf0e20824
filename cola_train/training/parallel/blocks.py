"""What is done to a network's blocks before sharding: fp8, recomputation, compilation."""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cola_train.config.loop import TrainerConfig
from cola_train.config.settings import require
from cola_train.devices import uses_gpu
from cola_train.models.blocks import blocks_of, time_parameters

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
# What the devices' fp8 matrix units take: so many inputs and outputs, or a multiple.
_MULTIPLE = 16
# Each pair of a block's class and what it is called with is compiled once: with and without
# gradients (training, reference encoder, validation), clean rows with masked ones or alone, the
# last block of the DiT. All blocks of a network share the result.
_MOST_KINDS = 64


def check_precision(config: TrainerConfig) -> None:
    """Refuse fp8, with a UserError, where torchao is not installed or the device computes none."""
    if config.precision != "fp8":
        return
    require(
        importlib.util.find_spec("torchao") is not None,
        "trainer.precision=fp8 needs torchao, which is not installed: pip install "
        "'cola-train[fp8]', or use bf16.",
    )
    device, capable = "a CPU", False
    if uses_gpu(config.accelerator):
        capability = torch.cuda.get_device_capability()
        device = f"{torch.cuda.get_device_name()} of capability {'.'.join(map(str, capability))}"
        capable = capability >= (8, 9)
    require(
        capable,
        "trainer.precision=fp8 needs a GPU that multiplies in fp8 (compute capability 8.9 or "
        f"newer, such as an H100), not {device}; use trainer.precision=bf16.",
    )


def multiply_in_fp8(objective: nn.Module, *, emulate: bool = False) -> None:
    """Replace linear layers of blocks by torchao's, with the same parameters; before sharding.

    Activations and weights are rounded to e4m3, gradients to e5m2, for the three products of a
    layer; each tensor is scaled by its largest entry of this pass, so rounding depends a little on
    a micro-batch's other rows, as in no other precision. Sums are fp32. Not replaced are adaLN's
    layers, which run on few rows, layers outside blocks, such as heads, and those whose widths are
    no multiples of 16. The DiT's last block multiplies a part of a weight, for the queries of some
    positions alone: that product stays in bf16. With `emulate` what is rounded is multiplied in the
    original precision, as any device can.

    Raises:
        UserError: no layer can be replaced.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    once_per_time = time_parameters(objective)
    fit = {
        id(layer)
        for block in blocks_of(objective)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
        and id(layer.weight) not in once_per_time
        and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0
    }
    require(
        bool(fit),
        "trainer.precision=fp8 would change nothing: no linear layer of a block has multiples of "
        f"{_MULTIPLE} inputs and outputs; use trainer.precision=bf16.",
    )
    # The number of positions need not be a multiple of 16: for a weight's gradient they are padded.
    config = Float8LinearConfig(pad_inner_dim=True, emulate=emulate)
    convert_to_float8_training(
        objective, module_filter_fn=lambda layer, name: id(layer) in fit, config=config
    )


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


def check_compiler(compiles: bool, on_gpu: bool) -> None:
    """A UserError where torch would fail at the first step for want of a C++ compiler, on a CPU."""
    named = os.environ.get("CXX", "g++")
    require(
        not compiles or on_gpu or shutil.which(named) is not None,
        f"trainer.compile=true needs a C++ compiler on a CPU, and there is no {named} (CXX, g++ "
        "without it): install one, or set trainer.compile=false.",
    )


def compile_blocks(objective: nn.Module, backend: str = "inductor") -> None:
    """Compile every block's forward and backward at its first call.

    After activation checkpointing, before sharding. Blocks and not the whole: what FSDP2 does
    between blocks cannot be part of a graph.
    """
    # not above: this module also refuses, before anything is trained, and the compiler is large
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_KINDS)
    for block in blocks_of(objective):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)

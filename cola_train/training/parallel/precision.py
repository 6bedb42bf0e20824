"""Matrix products in fp8, where the blocks of a network have them (torchao's float8 training)."""

import importlib.util

import torch
from torch import nn

from cola_train.config.loop import TrainerConfig
from cola_train.config.settings import require
from cola_train.devices import uses_gpu
from cola_train.models.blocks import blocks_of, time_parameters

# What the devices' fp8 matrix units take: so many inputs and outputs, or a multiple.
_MULTIPLE = 16


def check_precision(config: TrainerConfig) -> None:
    """Refuse fp8 where it cannot be.

    Raises:
        UserError: torchao is not installed, or the device computes no fp8.
    """
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
    positions alone: that product stays in bf16.

    Args:
        objective: holds the networks.
        emulate: round to fp8 and multiply in the original precision, as any device can.

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

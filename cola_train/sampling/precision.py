"""Passes in bf16: the numbers of autocast, without its casting of all weights in every pass."""

import copy
from typing import TypeVar

import torch
from torch import nn

from cola_train.config.sampling import SamplerConfig

Network = TypeVar("Network", bound=nn.Module)


def computes_in_bf16(config: SamplerConfig, device: torch.device) -> bool:
    """Whether `precision` means bf16 on a device."""
    return config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")


def ready_for_passes(network: Network, config: SamplerConfig, device: torch.device) -> Network:
    """The network itself in fp32; in bf16 a copy with bf16 linear layers and convolutions.

    All other weights are shared. Under autocast the copy gives the same numbers: these are the
    layers whose weights autocast casts. It casts them in every pass, since it keeps a cast weight
    only where a gradient is wanted.
    """
    if not computes_in_bf16(config, device):
        return network
    shared = (*network.parameters(), *network.buffers())
    memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            for parameter in module.parameters(recurse=False):
                weight = parameter.detach().bfloat16()
                memo[id(parameter)] = nn.Parameter(weight, requires_grad=False)
    return copy.deepcopy(network, memo)

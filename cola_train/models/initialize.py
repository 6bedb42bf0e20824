"""Initial weights: each tensor is a function of (seed, its name), for any order or sharding."""

import torch
from torch import Tensor, nn

from cola_train.models.config import TextVAEConfig, TransformerConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import named_generator


def initialize_text_vae(vae: TextVAE, seed: int) -> None:
    """Truncated normal weights (init_std, init_cutoff_factor), zero biases, unit norms."""
    for name, parameter in vae.named_parameters():
        _fill(parameter, text_vae_value(name, parameter.shape, vae.config, seed))


def initialize_dit(dit: BlockCausalDiT, seed: int) -> None:
    """Xavier-uniform weights, zero biases, unit norms; adaLN and output are 0 (adaLN-Zero)."""
    for name, parameter in dit.named_parameters():
        _fill(parameter, dit_value(name, parameter.shape, seed))


def _fill(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def text_vae_value(name: str, shape: torch.Size, config: TextVAEConfig, seed: int) -> Tensor:
    """The whole initial tensor of the VAE's parameter `name`, of `shape`."""
    if len(shape) == 1:
        return _vector(name, shape)
    std = config.init_std
    return _truncated_normal(f"vae.{name}", shape, std, std * config.init_cutoff_factor, seed)


def transformer_value(name: str, shape: torch.Size, config: TransformerConfig, seed: int) -> Tensor:
    """The whole initial tensor of a baseline's parameter: truncated normal weights, unit norms."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.initializer_range
    return _truncated_normal(f"transformer.{name}", shape, std, 3 * std, seed)


def dit_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The whole initial tensor of the DiT's parameter `name`, of `shape`."""
    if ".ada." in name or name.startswith(("txt_out_ada.", "txt_out.proj.")):
        return torch.zeros(shape)
    if len(shape) == 1:
        return _vector(name, shape)
    generator = named_generator(seed, f"dit.{name}")
    return nn.init.xavier_uniform_(torch.empty(shape), generator=generator)


def _truncated_normal(name: str, shape: torch.Size, std: float, cut: float, seed: int) -> Tensor:
    generator = named_generator(seed, name)
    return nn.init.trunc_normal_(torch.empty(shape), std=std, a=-cut, b=cut, generator=generator)


def _vector(name: str, shape: torch.Size) -> Tensor:
    return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)

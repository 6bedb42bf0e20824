"""Whole initial tensors of parameters: functions of (seed, name), for any order or sharding."""

import torch
from torch import Tensor, nn

from cola_train.models.config import TextVAEConfig, TransformerConfig
from cola_train.randomness import named_generator


def text_vae_value(name: str, shape: torch.Size, config: TextVAEConfig, seed: int) -> Tensor:
    """The VAE's: truncated normal weights (init_std, init_cutoff_factor), 0 biases, unit norms."""
    if len(shape) == 1:
        return _vector(name, shape)
    std = config.init_std
    return _truncated_normal(f"vae.{name}", shape, std, std * config.init_cutoff_factor, seed)


def transformer_value(name: str, shape: torch.Size, config: TransformerConfig, seed: int) -> Tensor:
    """A baseline's: truncated normal weights, unit norms."""
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.initializer_range
    return _truncated_normal(f"transformer.{name}", shape, std, 3 * std, seed)


def dit_value(name: str, shape: torch.Size, seed: int) -> Tensor:
    """The DiT's: Xavier-uniform weights, 0 biases, unit norms; 0 for adaLN and the output.

    A codebook that begins with logits of 0 knows what token frequencies tell.
    """
    if ".ada." in name or name.startswith(("txt_out_ada.", "txt_out.proj.", "codebook.proj.")):
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

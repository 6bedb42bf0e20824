"""How many parameters the Text VAE and the DiT have, by part, counted on meta tensors."""

import functools
from collections.abc import Mapping

import torch

from cola_train.flops.passes import named
from cola_train.models.blocks import parameters_by_part
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE


@functools.lru_cache
def vae_parameters(config: TextVAEConfig) -> Mapping[str, int]:
    """Parameters of the Text VAE by part."""
    with torch.device("meta"):
        vae = TextVAE(config)
    encoder, decoder = parameters_by_part(vae.encoder), parameters_by_part(vae.decoder)
    return named("vae.encoder", encoder) | named("vae.decoder", decoder)


@functools.lru_cache
def dit_parameters(config: DiTConfig) -> Mapping[str, int]:
    """Parameters of the DiT by part."""
    with torch.device("meta"):
        return named("dit", parameters_by_part(BlockCausalDiT(config)))

"""Networks with the initial weights that training from scratch begins with."""

import torch

from cola_train.models.dit import BlockCausalDiT
from cola_train.models.initialize import dit_value, text_vae_value
from cola_train.models.text_vae import TextVAE


def initialize_text_vae(vae: TextVAE, seed: int) -> None:
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.copy_(text_vae_value(name, parameter.shape, vae.config, seed))


def initialize_dit(dit: BlockCausalDiT, seed: int) -> None:
    with torch.no_grad():
        for name, parameter in dit.named_parameters():
            parameter.copy_(dit_value(name, parameter.shape, seed))

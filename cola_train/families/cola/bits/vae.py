"""A Text VAE that is written, not learned: a token's latent is its code, and is read as it."""

import math

import torch
from torch import Tensor

from cola_train.families.cola.bits.codes import BitCodes
from cola_train.models.config import TextVAEConfig

# What blocks add to the residual stream.
_ADDED = ("attn_out_proj.weight", "ffn_out.weight")


def written_vae_value(
    name: str, drawn: Tensor, config: TextVAEConfig, codes: BitCodes, log_snr: float
) -> Tensor:
    """A tensor of the VAE, `drawn` where it is not written; its blocks pass on what they read.

    The encoder's mean is the token's code, its variance exp(-log_snr). The decoder's logits are the
    log-likelihood of each token's code, up to a constant, given a latent of the usual length. The
    [mask] id has a code of 0.
    """
    written, channels = codes.codes, config.latent_dim
    value = torch.zeros_like(drawn)
    if name.endswith(_ADDED):
        return value
    if name == "encoder.wte.weight":
        value[: len(written), :channels] = written
    elif name == "encoder.patch_embedder.weight":
        value[:, :, 0] = torch.eye(config.dim)
    elif name == "encoder.final_layer.weight":
        value[:channels, :channels] = torch.eye(channels)
    elif name == "encoder.final_layer.bias":
        value[channels:] = -log_snr
    elif name == "decoder.in_layer.weight":
        value[:channels] = torch.eye(channels)
    elif name == "decoder.unpatch_layer.weight":
        value[:] = torch.eye(config.dim)
    elif name == "decoder.final_layer.weight":
        variance = math.exp(-log_snr)
        # The last norm divides by the root mean square over the whole width.
        value[:, :channels] = written * math.sqrt(channels * (1 + variance) / config.dim) / variance
    else:
        return drawn
    return value

"""A Text VAE that is written, not learned: a token's latent is its code, and is read as it."""

import math

import torch
from torch import Tensor

from cola_train.families.cola.bits.codes import BitCodes
from cola_train.models.config import TextVAEConfig

# What blocks add to the residual stream.
_ADDED = ("attn_out_proj.weight", "ffn_out.weight")
# More, and rare tokens are read as frequent ones with nearly the same code.
_CAUTION = 6.0


def written_vae_value(
    name: str, drawn: Tensor, config: TextVAEConfig, codes: BitCodes, log_snr: float
) -> Tensor:
    """A tensor of the VAE, `drawn` where it is not written; its blocks pass on what they read.

    The encoder's mean is the token's code, its variance exp(-log_snr). The decoder's logits are
    log p of each token given a latent of the usual length, up to a constant, with _CAUTION times
    that variance: what a DiT writes is farther from codes than what the encoder does. The [mask] id
    has a code of 0.
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
        length = math.sqrt(channels * (1 + variance) / config.dim)
        value[:, :channels] = written * length / (_CAUTION * variance)
    elif name == "decoder.final_layer.bias":
        value[:] = codes.log_p
    else:
        return drawn
    return value

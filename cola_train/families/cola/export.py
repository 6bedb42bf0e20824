"""From the weights of a run to the networks that it ships."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import ColaRunConfig
from cola_train.models.config import DiTConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.tensor_files import Below


@dataclasses.dataclass(frozen=True)
class FixedLogSNR(Mapping[str, Tensor]):
    """A VAE's weights with a fixed logSNR, which the encoder's final layer then states.

    Training does not use that layer's log-variance half: here its weight is 0, its bias -logSNR.
    """

    weights: Mapping[str, Tensor]
    log_snr: float
    channels: int

    def __getitem__(self, name: str) -> Tensor:
        value = self.weights[name]
        if name.startswith("encoder.final_layer."):
            value = value.clone()
            value[self.channels :] = 0.0 if name.endswith(".weight") else -self.log_snr
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def vae_weights(config: ColaRunConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A run's VAE as it is exported, by names in the VAE, from the objective's weights."""
    vae, fixed = Below(weights, "vae."), config.fixed_log_snr
    return vae if fixed is None else FixedLogSNR(vae, fixed, config.vae.latent_dim)


def in_memory(
    config: ColaRunConfig,
    dit_config: DiTConfig | None,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    device: str | torch.device,
) -> ColaCheckpoint:
    """The checkpoint of an objective's weights; without a DiT where `dit_config` is None."""
    vae, dit = TextVAE(config.vae), None
    vae.load_state_dict(dict(vae_weights(config, weights)))
    if dit_config is not None:
        dit = BlockCausalDiT(dit_config)
        dit.load_state_dict(dict(Below(weights, "dit.")))
    return ColaCheckpoint(vae, dit, tokenizer, dict(training)).for_inference(device)


def with_reference_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights whose VAE has the reference encoder in place of its own; None where there is none."""
    reference = Below(weights, "reference_encoder.")
    encoder = {f"vae.encoder.{name}": value for name, value in reference.items()}
    return {**weights, **encoder} if encoder else None

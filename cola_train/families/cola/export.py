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

_REFERENCE = "reference_encoder."


@dataclasses.dataclass(frozen=True)
class FixedLogSNR(Mapping[str, Tensor]):
    """A VAE's weights where the logSNR was fixed: the log-variance half of the encoder's final
    layer, not used, says so.
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
    """A run's VAE as it is exported, from its weights by their names in the VAE."""
    fixed = config.fixed_log_snr
    return weights if fixed is None else FixedLogSNR(weights, fixed, config.vae.latent_dim)


def in_memory(
    config: ColaRunConfig,
    dit_config: DiTConfig | None,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    device: str | torch.device,
) -> ColaCheckpoint:
    """The checkpoint of a run's weights, by their names in the objective; without a DiT where
    `dit_config` is None.
    """
    vae, dit = TextVAE(config.vae), None
    vae.load_state_dict(dict(vae_weights(config, Below(weights, "vae."))))
    if dit_config is not None:
        dit = BlockCausalDiT(dit_config)
        dit.load_state_dict(dict(Below(weights, "dit.")))
        dit.to(device).eval().requires_grad_(False)
    return ColaCheckpoint(
        vae.to(device).eval().requires_grad_(False), dit, tokenizer, dict(training)
    )


def with_reference_encoder(weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights whose VAE has the reference encoder in place of its own; None where a run keeps
    none.
    """
    encoder = {f"vae.encoder.{name}": value for name, value in Below(weights, _REFERENCE).items()}
    return {**weights, **encoder} if encoder else None

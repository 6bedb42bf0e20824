"""Stage 1, Text VAE pretraining (method, section 2).

L = reconstruction + beta KL(q || N(0, I)) + lambda_mask L_mask
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola.config import Stage1Config
from cola_train.families.cola.vae_losses import vae_counts, vae_log_snr, vae_pass
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import Objective, Term


class Stage1Objective(Objective):
    """The losses of the VAE that it holds and trains."""

    timed_forwards: ClassVar[Mapping[str, str]] = {"vae.encoder": "encode", "vae.decoder": "decode"}

    def __init__(self, vae: TextVAE, config: Stage1Config, seed: int) -> None:
        super().__init__()
        self.vae, self.config, self.seed = vae, config, seed

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Real tokens, latents and masked tokens."""
        return vae_counts(batch, self.vae.config.patch_size, self.config, self.seed)

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """Reconstruction, KL (nats per token, summed over channels), mask loss, and metrics."""
        out = vae_pass(self.vae, batch, self.config, self.seed)
        return [
            out.reconstruction,
            out.divergence("kl", out.posterior.kl_to_standard_normal(), self.config.kl_weight),
            *out.mask,
            *out.metrics,
        ]

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return vae_log_snr(means)

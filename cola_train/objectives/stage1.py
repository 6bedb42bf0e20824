"""Stage 1, Text VAE pretraining: L = reconstruction + beta KL(q || N(0, I)) + lambda_mask L_mask (method, section 2)."""

from torch import Tensor, nn

from cola_train.config.objectives import Stage1Config
from cola_train.data.datamodule import Batch
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.losses import Counts, Losses, latent_mask, mean_share, vae_counts, vae_pass


class Stage1Objective(nn.Module):
    """From a batch to its share of the step's losses; holds the VAE it trains."""

    def __init__(self, vae: TextVAE, config: Stage1Config, seed: int) -> None:
        super().__init__()
        self.vae, self.config, self.seed = vae, config, seed

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What this batch adds to each mean's denominator; the caller adds over micro-batches and processes."""
        return vae_counts(batch, self.vae.config.patch_size, self.config, self.seed)

    def forward(self, batch: Batch, counts: Counts) -> Losses:
        """The losses of `batch`, each a sum over it divided by the step's `counts`.

        Terms: reconstruction (nats per token), kl (nats per token: summed over channels, divided by real tokens), mask (nats per
        masked token), reconstruction accuracy (share), and the two moments of the VAE logSNR.
        """
        out = vae_pass(self.vae, batch, counts, self.config, self.seed)
        real = latent_mask(batch.loss_mask, self.vae.config.patch_size)
        kl = (out.posterior.kl_to_standard_normal() * real).sum()
        terms = {**out.terms, "kl_nats_per_token": mean_share("kl_nats_per_token", kl, counts)}
        return Losses(terms, self.weights(), out.metrics)

    def weights(self) -> dict[str, float]:
        """The weight of each term in the total."""
        weights = {"reconstruction_nats_per_token": 1.0, "kl_nats_per_token": self.config.kl_weight}
        if self.config.mask_weight > 0:
            weights["mask_nats_per_masked_token"] = self.config.mask_weight
        return weights

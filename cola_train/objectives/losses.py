"""What an objective returns, and the loss terms both stages share.

Every figure is a sum over this batch divided by a count over the *whole* optimizer step (all processes, all micro-batches). So the
figures of micro-batches add up to the step's means, and neither the losses nor the gradients depend on how a step is cut up.
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.config.objectives import Stage1Config, Stage2Config
from cola_train.data.datamodule import Batch
from cola_train.models.posterior import Posterior
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose, normal, round_up_to_draws, uniform

Counts = Mapping[str, Tensor]
VAELossConfig = Stage1Config | Stage2Config


# The count that each figure is a mean over.
DENOMINATORS = {
    "reconstruction_nats_per_token": "tokens",
    "reconstruction_accuracy": "tokens",
    "mask_nats_per_masked_token": "masked_tokens",
    "kl_nats_per_token": "tokens",
    "negative_entropy_nats_per_token": "tokens",
    "reference_kl_nats_per_token": "tokens",
    "flow_mse": "flow_latents",
    "posterior_mean_square": "latents",
    "posterior_variance": "latents",
    "next_token_nats_per_token": "predicted_tokens",
    "next_token_accuracy": "predicted_tokens",
    "masked_diffusion_nats_per_token": "tokens",
    "masked_token_accuracy": "masked_tokens",
}


@dataclasses.dataclass(frozen=True)
class Losses:
    """The terms to minimise, by names that end in their unit, with their weights; and metrics, without gradient."""

    terms: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    metrics: dict[str, Float[Tensor, ""]]

    @property
    def total(self) -> Float[Tensor, ""]:
        """The weighted sum, to minimise."""
        return torch.stack([self.weights[name] * value for name, value in self.terms.items()]).sum()

    def figures(self) -> dict[str, Float[Tensor, ""]]:
        """Terms and metrics, detached."""
        return {name: value.detach() for name, value in (self.terms | self.metrics).items()}


def summarise(figures: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A step's added-up figures with what follows from them: the total loss, and the VAE logSNR log(mean(mu^2) / mean(sigma^2))."""
    loss = sum(weights[name] * figures[name] for name in weights)
    if "posterior_mean_square" not in figures:
        return {"loss": loss, **figures}
    square, variance = figures["posterior_mean_square"], figures["posterior_variance"]
    ratio = square / variance if square > 0 and variance > 0 else math.nan
    return {"loss": loss, **figures, "vae_log_snr": math.log(ratio)}


def mean_share(name: str, total: Float[Tensor, ""], counts: Counts) -> Float[Tensor, ""]:
    """A figure's sum over this batch as its share of the step's mean; a count of 0 gives 0."""
    return total / counts[DENOMINATORS[name]].clamp(min=1)


def latent_mask(loss_mask: Bool[Tensor, "batch seq"], patch_size: int) -> Bool[Tensor, "batch latents"]:
    """A latent counts if any of its tokens does."""
    return loss_mask.unflatten(1, (-1, patch_size)).any(-1)


def latent_documents(batch: Batch, patch_size: int, mask_documents: bool) -> Int[Tensor, "batch latents"] | None:
    """The document of each latent, or None where attention may cross documents."""
    return batch.document_ids[:, ::patch_size] if mask_documents else None


def mask_positions(batch: Batch, ratio: float, seed: int) -> Int[Tensor, "batch masked"]:
    """Which tokens [mask] replaces: the round(ratio x seq) (at least one) real tokens with the smallest draws, in each row."""
    seq = batch.tokens.shape[1]
    draws = uniform(seed, Purpose.TOKEN_MASK, batch.sample_index, seq)
    # Padding sorts last; where a row has too few real tokens, its loss_mask still keeps padding out of the loss.
    draws = draws + (~batch.loss_mask).float()
    return draws.argsort(dim=1, stable=True)[:, : max(1, round(ratio * seq))]


def standard_normal_latents(
    seed: int, purpose: Purpose, batch: Batch, num_latents: int, channels: int, copies: int = 1
) -> Float[Tensor, "batch noised channels"]:
    """N(0, I) for each latent of each sample, one copy after another."""
    count = num_latents * channels
    each = [normal(seed, purpose, batch.sample_index, count, copy * round_up_to_draws(count)) for copy in range(copies)]
    return torch.cat(each, dim=1).unflatten(1, (copies * num_latents, channels))


@dataclasses.dataclass(frozen=True)
class VAEPass:
    """What one pass of the VAE over clean and masked copies gives."""

    posterior: Posterior  # of the clean copy
    z_0: Float[Tensor, "batch latents channels"]  # the one posterior sample that feeds decoder and flow
    terms: dict[str, Tensor]  # reconstruction and, where it has a weight, mask loss
    metrics: dict[str, Tensor]


def vae_counts(batch: Batch, patch_size: int, config: VAELossConfig, seed: int) -> dict[str, Tensor]:
    """Real tokens, latents and masked tokens of a batch, to be added over the step."""
    counts = {
        "tokens": batch.loss_mask.sum(),
        "latents": latent_mask(batch.loss_mask, patch_size).sum(),
    }
    if config.mask_weight > 0:
        counts["masked_tokens"] = batch.loss_mask.gather(1, mask_positions(batch, config.mask_ratio, seed)).sum()
    return counts


def vae_pass(vae: TextVAE, batch: Batch, counts: Counts, config: VAELossConfig, seed: int) -> VAEPass:
    """Encode clean and masked copies as one batch, sample, decode; cross-entropies in nats per (masked) token.

    Reconstruction: mean over real tokens of -log p(x | z_0), z_0 a posterior sample (method, section 2).
    Mask loss: mean over masked real tokens of -log p(x | z_0 of the masked copy).
    """
    patch_size, channels = vae.config.patch_size, vae.config.latent_dim
    document = latent_documents(batch, patch_size, config.mask_documents)
    rows, num_latents = batch.tokens.shape[0], batch.tokens.shape[1] // patch_size
    tokens, documents = batch.tokens, document
    eps = standard_normal_latents(seed, Purpose.POSTERIOR_EPS, batch, num_latents, channels)
    if config.mask_weight > 0:
        masked_at = mask_positions(batch, config.mask_ratio, seed)
        tokens = torch.cat([tokens, tokens.scatter(1, masked_at, vae.mask_token_id)])
        documents = None if document is None else torch.cat([document, document])
        eps = torch.cat([eps, standard_normal_latents(seed, Purpose.MASKED_POSTERIOR_EPS, batch, num_latents, channels)])
    posterior = vae.encode(tokens, documents)
    if config.fixed_log_snr is not None:
        posterior = posterior.with_log_snr(config.fixed_log_snr)
    z_0 = posterior.sample(eps)
    hidden = vae.decoder(z_0, documents)
    clean = Posterior(posterior.mean[:rows], posterior.logvar[:rows])

    head = vae.decoder.final_layer
    nats, right = head.losses(hidden[:rows], batch.tokens, batch.loss_mask.float())
    sums = {"reconstruction_nats_per_token": nats}
    if config.mask_weight > 0:
        # The vocabulary head is the dearest layer: it runs at the masked positions alone.
        hidden_masked = hidden[rows:].gather(1, masked_at[..., None].expand(-1, -1, hidden.shape[-1]))
        targets, counted = batch.tokens.gather(1, masked_at), batch.loss_mask.gather(1, masked_at)
        sums["mask_nats_per_masked_token"], _ = head.losses(hidden_masked, targets, counted.float())
    with torch.no_grad():
        real = latent_mask(batch.loss_mask, patch_size)[..., None]
        metric_sums = {
            "reconstruction_accuracy": right,
            "posterior_mean_square": (clean.mean.square() * real).mean(-1).sum(),
            "posterior_variance": (clean.logvar.exp() * real).mean(-1).sum(),
        }
    return VAEPass(
        clean,
        z_0[:rows],
        terms={name: mean_share(name, total, counts) for name, total in sums.items()},
        metrics={name: mean_share(name, total, counts) for name, total in metric_sums.items()},
    )


def token_nats(logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """-log p of each target, nats, in fp32."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").unflatten(0, targets.shape)

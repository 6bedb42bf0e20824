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

from cola_train.data.datamodule import Batch
from cola_train.models.posterior import Posterior
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose, normal, uniform

Counts = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Losses:
    """The weighted total to minimise, and every term and metric by name (unweighted, detached; the name ends in its unit)."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]


def derived_metrics(terms: Mapping[str, float]) -> dict[str, float]:
    """Metrics that are not sums, from a step's added-up terms: the VAE logSNR log(mean(mu^2) / mean(sigma^2))."""
    if "posterior_mean_square" not in terms:
        return {}
    return {"vae_log_snr": math.log(max(terms["posterior_mean_square"], 1e-30) / max(terms["posterior_variance"], 1e-30))}


def per(total: Float[Tensor, ""], counts: Counts, name: str) -> Float[Tensor, ""]:
    """A sum over this batch as its share of the step's mean; a count of 0 gives 0."""
    return total / counts[name].clamp(min=1)


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
    seed: int, purpose: Purpose, batch: Batch, num_latents: int, channels: int
) -> Float[Tensor, "batch latents channels"]:
    """N(0, I) for each latent of each sample."""
    return normal(seed, purpose, batch.sample_index, num_latents * channels).unflatten(1, (num_latents, channels))


@dataclasses.dataclass(frozen=True)
class VAEPass:
    """What one pass of the VAE over clean and masked copies gives."""

    posterior: Posterior  # of the clean copy
    z_0: Float[Tensor, "batch latents channels"]  # the one posterior sample that feeds decoder and flow
    reconstruction: Float[Tensor, ""]
    mask: Float[Tensor, ""] | None  # None without mask loss
    terms: dict[str, Tensor]


def vae_counts(batch: Batch, patch_size: int, mask_ratio: float, mask_weight: float, seed: int) -> dict[str, Tensor]:
    """Real tokens, latents and masked tokens of a batch, to be added over the step."""
    counts = {
        "tokens": batch.loss_mask.sum(),
        "latents": latent_mask(batch.loss_mask, patch_size).sum(),
    }
    if mask_weight > 0:
        counts["masked_tokens"] = batch.loss_mask.gather(1, mask_positions(batch, mask_ratio, seed)).sum()
    return counts


def vae_pass(
    vae: TextVAE,
    batch: Batch,
    counts: Counts,
    *,
    seed: int,
    mask_ratio: float,
    mask_weight: float,
    fixed_log_snr: float | None,
    mask_documents: bool,
) -> VAEPass:
    """Encode clean and masked copies as one batch, sample, decode; cross-entropies in nats per (masked) token.

    Reconstruction: mean over real tokens of -log p(x | z_0), z_0 a posterior sample (method, section 2).
    Mask loss: mean over masked real tokens of -log p(x | z_0 of the masked copy).
    """
    patch_size, channels = vae.config.patch_size, vae.config.latent_dim
    document = latent_documents(batch, patch_size, mask_documents)
    rows, num_latents = batch.tokens.shape[0], batch.tokens.shape[1] // patch_size
    tokens, documents = batch.tokens, document
    eps = standard_normal_latents(seed, Purpose.POSTERIOR_EPS, batch, num_latents, channels)
    if mask_weight > 0:
        masked_at = mask_positions(batch, mask_ratio, seed)
        tokens = torch.cat([tokens, tokens.scatter(1, masked_at, vae.mask_token_id)])
        documents = None if document is None else torch.cat([document, document])
        eps = torch.cat([eps, standard_normal_latents(seed, Purpose.MASKED_POSTERIOR_EPS, batch, num_latents, channels)])
    posterior = vae.encode(tokens, documents)
    if fixed_log_snr is not None:
        posterior = posterior.with_log_snr(fixed_log_snr)
    z_0 = posterior.sample(eps)
    hidden = vae.decoder(z_0, documents)
    clean = Posterior(posterior.mean[:rows], posterior.logvar[:rows])

    logits = vae.decoder.head(hidden[:rows])
    reconstruction = per(_cross_entropy_sum(logits, batch.tokens, batch.loss_mask), counts, "tokens")
    with torch.no_grad():
        right = ((logits.argmax(-1) == batch.tokens) & batch.loss_mask).sum()
        real = latent_mask(batch.loss_mask, patch_size)[..., None]
    terms = {
        "reconstruction_nats_per_token": reconstruction.detach(),
        "reconstruction_accuracy": per(right.float(), counts, "tokens"),
        "posterior_mean_square": per((clean.mean.detach().square() * real).mean(-1).sum(), counts, "latents"),
        "posterior_variance": per((clean.logvar.detach().exp() * real).mean(-1).sum(), counts, "latents"),
    }
    mask = None
    if mask_weight > 0:
        # The vocabulary head is the dearest layer: it runs at the masked positions alone.
        hidden_masked = hidden[rows:].gather(1, masked_at[..., None].expand(-1, -1, hidden.shape[-1]))
        targets, counted = batch.tokens.gather(1, masked_at), batch.loss_mask.gather(1, masked_at)
        mask = per(_cross_entropy_sum(vae.decoder.head(hidden_masked), targets, counted), counts, "masked_tokens")
        terms["mask_nats_per_masked_token"] = mask.detach()
    return VAEPass(clean, z_0[:rows], reconstruction, mask, terms)


def _cross_entropy_sum(
    logits: Float[Tensor, "batch seq vocab"], targets: Int[Tensor, "batch seq"], counted: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    nats = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return (nats * counted.flatten()).sum()

"""Stage 1, Text VAE pretraining (method, section 2), and the VAE's terms that both stages share.

L = reconstruction + beta KL(q || N(0, I)) + lambda_mask L_mask
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola.losses import Stage1Config, Stage2Config
from cola_train.models.text_vae import Posterior, TextVAE
from cola_train.objectives.objective import Objective, Term, documents_of
from cola_train.randomness import Purpose, normal, round_up_to_draws, uniform

VAELossConfig = Stage1Config | Stage2Config


def latent_mask(
    loss_mask: Bool[Tensor, "batch seq"], patch_size: int
) -> Bool[Tensor, "batch latents"]:
    """A latent counts if any of its tokens does."""
    return loss_mask.unflatten(1, (-1, patch_size)).any(-1)


def mask_positions(batch: Batch, ratio: float, seed: int) -> Int[Tensor, "batch masked"]:
    """The tokens that [mask] replaces: in each row the real ones with the smallest draws.

    Of n real tokens it is round(ratio x n), at least one. All rows have as many positions as a full
    one has; the rest are padding, which is neither replaced nor counted.
    """
    seq = batch.tokens.shape[1]
    draws = uniform(seed, Purpose.TOKEN_MASK, batch.sample_index, seq)
    # Padding sorts last.
    order = (draws + (~batch.loss_mask).float()).argsort(dim=1, stable=True)
    real = batch.loss_mask.sum(1, keepdim=True)
    masked = (ratio * real.double()).round().clamp(min=1).long().minimum(real)
    column = torch.arange(max(1, round(ratio * seq)), device=order.device)
    return order.gather(1, torch.where(column < masked, column, column + real - masked))


def draw_copies(
    draw: Callable[..., Tensor],
    seed: int,
    purpose: Purpose,
    sample_index: Int[Tensor, " batch"],
    count: int,
    copies: int,
) -> Float[Tensor, "batch draws"]:
    """`count` values of `draw` (`uniform` or `normal`) for each of `copies`, one after another.

    The first copy's are those of a run with one copy.
    """
    starts = [copy * round_up_to_draws(count) for copy in range(copies)]
    each = [draw(seed, purpose, sample_index, count, start) for start in starts]
    return torch.cat(each, dim=1)


def standard_normal_latents(
    seed: int, purpose: Purpose, batch: Batch, num_latents: int, channels: int, copies: int = 1
) -> Float[Tensor, "batch noised channels"]:
    """N(0, I) for each latent of each sample, one copy after another."""
    count = num_latents * channels
    draws = draw_copies(normal, seed, purpose, batch.sample_index, count, copies)
    return draws.unflatten(1, (copies * num_latents, channels))


def hold_log_snr(posterior: Posterior, config: VAELossConfig) -> Posterior:
    """The posterior, with the logSNR that the settings fix, if they do."""
    fixed = config.fixed_log_snr
    return posterior if fixed is None else posterior.with_log_snr(fixed)


@dataclasses.dataclass(frozen=True)
class VAEPass:
    """What one pass of the VAE over clean and masked copies of a batch gives."""

    posterior: Posterior  # of the clean copy
    # the one posterior sample that feeds decoder and flow
    z_0: Float[Tensor, "batch latents channels"]
    real: Bool[Tensor, "batch latents"]
    # mean over real tokens of -log p(x | z_0), z_0 a posterior sample (method, section 2)
    reconstruction: Term
    # the same over masked real tokens, z_0 of the masked copy; empty where the mask loss is off
    mask: list[Term]
    # reconstruction accuracy (share), and the two moments of the VAE logSNR, means over channels
    metrics: list[Term]

    def divergence(self, name: str, nats: Float[Tensor, "batch latents"], weight: float) -> Term:
        """The posterior's KL or the like, summed over latents, divided by real tokens."""
        return Term(name, "nats_per_token", (nats * self.real).sum(), "tokens", weight)


def vae_log_snr(means: Mapping[str, float]) -> dict[str, float]:
    """log(mean(mu^2) / mean(sigma^2)) of a step's means.

    NaN where one of them is 0, nothing where the VAE took no part.
    """
    if "posterior_mean_square" not in means:
        return {}
    square, variance = means["posterior_mean_square"], means["posterior_variance"]
    return {"vae_log_snr": math.log(square / variance) if square > 0 and variance > 0 else math.nan}


def vae_counts(
    batch: Batch, patch_size: int, config: VAELossConfig, seed: int
) -> dict[str, Tensor]:
    """Real tokens, latents and masked tokens of a batch, to be added over the step."""
    counts = {
        "tokens": batch.loss_mask.sum(),
        "latents": latent_mask(batch.loss_mask, patch_size).sum(),
    }
    if config.mask_weight > 0:
        masked_at = mask_positions(batch, config.mask_ratio, seed)
        counts["masked_tokens"] = batch.loss_mask.gather(1, masked_at).sum()
    return counts


def vae_pass(
    vae: TextVAE, batch: Batch, config: VAELossConfig, seed: int, weight: float = 1.0
) -> VAEPass:
    """Encode clean and masked copies as one batch, sample, decode.

    `weight` is that of reconstruction, and multiplies the mask loss's.
    """
    patch_size, channels = vae.config.patch_size, vae.config.latent_dim
    rows, num_latents = batch.tokens.shape[0], batch.tokens.shape[1] // patch_size

    def noise(purpose: Purpose) -> Tensor:
        return standard_normal_latents(seed, purpose, batch, num_latents, channels)

    tokens, documents = batch.tokens, documents_of(batch, patch_size, config.mask_documents)
    eps = noise(Purpose.POSTERIOR_EPS)
    if config.mask_weight > 0:
        masked_at = mask_positions(batch, config.mask_ratio, seed)
        targets, counted = tokens.gather(1, masked_at), batch.loss_mask.gather(1, masked_at)
        replaced = torch.where(counted, vae.mask_token_id, targets)
        tokens = torch.cat([tokens, tokens.scatter(1, masked_at, replaced)])
        documents = None if documents is None else torch.cat([documents, documents])
        eps = torch.cat([eps, noise(Purpose.MASKED_POSTERIOR_EPS)])
    posterior = hold_log_snr(vae.encode(tokens, documents), config)
    z_0 = posterior.sample(eps)
    hidden = vae.decoder(z_0, documents)
    clean = Posterior(posterior.mean[:rows], posterior.logvar[:rows])

    head = vae.decoder.final_layer
    nats, right = head.losses(hidden[:rows], batch.tokens, batch.loss_mask.float())
    mask = []
    if config.mask_weight > 0:
        # The vocabulary head is the costliest layer: it runs at the masked positions alone.
        at = masked_at[..., None].expand(-1, -1, hidden.shape[-1])
        mask_nats, _ = head.losses(hidden[rows:].gather(1, at), targets, counted.float())
        mask_weight = weight * config.mask_weight
        mask = [Term("mask", "nats_per_masked_token", mask_nats, "masked_tokens", mask_weight)]
    real = latent_mask(batch.loss_mask, patch_size)
    with torch.no_grad():
        mean_square = (clean.mean.square() * real[..., None]).mean(-1).sum()
        variance = (clean.logvar.exp() * real[..., None]).mean(-1).sum()
    return VAEPass(
        clean,
        z_0[:rows],
        real,
        reconstruction=Term("reconstruction", "nats_per_token", nats, "tokens", weight),
        mask=mask,
        metrics=[
            Term("reconstruction_accuracy", "", right, "tokens"),
            Term("posterior_mean_square", "", mean_square, "latents"),
            Term("posterior_variance", "", variance, "latents"),
        ],
    )


class Stage1Objective(Objective):
    """The losses of the VAE that it holds and trains."""

    timed_forwards: ClassVar[Mapping[str, str]] = {"vae.encoder": "encode", "vae.decoder": "decode"}

    def __init__(self, vae: TextVAE, config: Stage1Config, seed: int) -> None:
        super().__init__()
        self.vae, self.config, self.seed = vae, config, seed

    def counts(self, batch: Batch) -> dict[str, Tensor]:
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

"""Stage 2, VAE and DiT jointly (method, section 3):

L = lambda_VAE (reconstruction + beta E_q[log q] + lambda_mask L_mask) + lambda_fm L_FM + lambda_ref
KL(q || q_ref)
"""

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola.config import Stage2Config
from cola_train.families.cola.flow_draws import FlowDraws, flow_draws, position_times
from cola_train.families.cola.vae_losses import (
    latent_mask,
    standard_normal_latents,
    vae_counts,
    vae_log_snr,
    vae_pass,
)
from cola_train.flow import interpolate, velocity_target
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.posterior import Posterior
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import Objective, Term, documents_of
from cola_train.randomness import Purpose


class Stage2Objective(Objective):
    """Holds VAE, DiT and the frozen reference encoder.

    The reference encoder is a copy of the VAE's encoder at construction, so build this after
    loading stage 1.
    """

    timed_forwards: ClassVar[Mapping[str, str]] = {
        "vae.encoder": "encode",
        "reference_encoder": "encode by the reference",
        "vae.decoder": "decode",
        "dit": "forward of the DiT",
    }

    def __init__(self, vae: TextVAE, dit: BlockCausalDiT, config: Stage2Config, seed: int) -> None:
        super().__init__()
        self.vae, self.dit, self.config, self.seed = vae, dit, config, seed
        trains_vae = config.vae_strategy.mode != "fix"
        vae.requires_grad_(trains_vae)
        self.reference_encoder = None
        if trains_vae and config.reference_weight > 0:
            self.reference_encoder = copy.deepcopy(vae.encoder).requires_grad_(False)

    def _draws(self, batch: Batch) -> FlowDraws:
        block_size = self.dit.config.block_size
        num_blocks = batch.tokens.shape[1] // (self.vae.config.patch_size * block_size)
        return flow_draws(self.config.flow, batch.sample_index, num_blocks, block_size, self.seed)

    def _counted(self, batch: Batch, draws: FlowDraws) -> Bool[Tensor, "batch noised"]:
        real = latent_mask(batch.loss_mask, self.vae.config.patch_size)
        return real.repeat(1, self.config.flow.noise_copies) & ~draws.pinned

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Real tokens, latents and masked tokens; and noised latents that are not a prompt's."""
        counts = vae_counts(batch, self.vae.config.patch_size, self.config, self.seed)
        counts["flow_latents"] = self._counted(batch, self._draws(batch)).sum()
        return counts

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """flow_mse, the mean over counted latents and channels of (v_psi - (z_1 - z_0))^2; and the
        VAE's terms.

        These are left out in frozen phases of Fix and Interval, where the VAE only encodes, without
        gradient: reconstruction and mask loss; negative entropy E_q[log q] and KL(q || q_ref), in
        nats per token (summed over channels, divided by real tokens).
        """
        trains_vae = step is None or self.config.vae_strategy.trains_vae(step)
        return self._joint(batch) if trains_vae else self._frozen(batch)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The VAE logSNR."""
        return vae_log_snr(means)

    def learning_rate_factor(self, name: str) -> float:
        """The VAE may learn at a rate of its own (vae_strategy.learning_rate_factor)."""
        return self.config.vae_strategy.learning_rate_factor if name.startswith("vae.") else 1.0

    def _frozen(self, batch: Batch) -> list[Term]:
        config, patch_size = self.config, self.vae.config.patch_size
        with torch.no_grad():
            posterior = self.vae.encode(
                batch.tokens, documents_of(batch, patch_size, config.mask_documents)
            )
            if config.fixed_log_snr is not None:
                posterior = posterior.with_log_snr(config.fixed_log_snr)
            latents, channels = posterior.mean.shape[1:]
            z_0 = posterior.sample(
                standard_normal_latents(self.seed, Purpose.POSTERIOR_EPS, batch, latents, channels)
            )
        return [self._flow(batch, z_0)]

    def _joint(self, batch: Batch) -> list[Term]:
        config, patch_size = self.config, self.vae.config.patch_size
        out = vae_pass(self.vae, batch, config, self.seed)
        real = latent_mask(batch.loss_mask, patch_size)
        negative_entropy = (out.posterior.negative_entropy() * real).sum()
        reference = []
        if self.reference_encoder is not None:
            kl = (out.posterior.kl_to(self._reference(batch)) * real).sum()
            reference = [
                Term("reference_kl", "nats_per_token", kl, "tokens", config.reference_weight)
            ]
        entropy_weight = config.vae_weight * config.entropy_weight
        return [
            self._flow(batch, out.z_0),
            out.reconstruction(config.vae_weight),
            Term("negative_entropy", "nats_per_token", negative_entropy, "tokens", entropy_weight),
            *out.mask(config.vae_weight * config.mask_weight),
            *reference,
            *out.metrics(),
        ]

    def _reference(self, batch: Batch) -> Posterior:
        assert self.reference_encoder is not None
        config = self.config
        with torch.no_grad():
            document = documents_of(batch, self.vae.config.patch_size, config.mask_documents)
            reference: Posterior = self.reference_encoder(batch.tokens, document)
        return (
            reference
            if config.fixed_log_snr is None
            else reference.with_log_snr(config.fixed_log_snr)
        )

    def _flow(self, batch: Batch, z_0: Float[Tensor, "batch latents channels"]) -> Term:
        config, copies = self.config, self.config.flow.noise_copies
        draws = self._draws(batch)
        times = position_times(draws, self.dit.config.block_size, config.flow)
        _, latents, channels = z_0.shape
        z_1 = standard_normal_latents(
            self.seed, Purpose.FLOW_NOISE, batch, latents, channels, copies
        )
        document = documents_of(batch, self.vae.config.patch_size, config.mask_documents)
        # Figure 1: the target and the history are sg(z_0), pinned prompt positions too; only z_t
        # may carry gradient to q_phi.
        detached = z_0.detach().repeat(1, copies, 1)
        path_start = z_0.repeat(1, copies, 1) if config.flow.grad_to_encoder else detached
        pinned = draws.pinned[..., None]
        z_t = torch.where(
            pinned, detached, interpolate(path_start, z_1, times.distinct[times.index][..., None])
        )
        velocity = self.dit.velocity(z_t, z_0.detach(), times, document, draws.sees_history)
        error = (velocity - velocity_target(detached, z_1)).square().mean(-1)
        return Term(
            "flow",
            "mse",
            (error * self._counted(batch, draws)).sum(),
            "flow_latents",
            config.flow_weight,
        )

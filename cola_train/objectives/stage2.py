"""Stage 2, VAE and DiT jointly (method, section 3):

L = lambda_VAE (reconstruction + beta E_q[log q] + lambda_mask L_mask) + lambda_fm L_FM + lambda_ref KL(q || q_ref)
"""

import copy
import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from cola_train.config.objectives import FlowConfig, Stage2Config
from cola_train.data.datamodule import Batch
from cola_train.flow import interpolate, logit_normal_time, velocity_target
from cola_train.models.dit import BlockCausalDiT, Times
from cola_train.models.posterior import Posterior
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.losses import (
    Counts,
    Losses,
    latent_documents,
    latent_mask,
    mean_share,
    standard_normal_latents,
    vae_counts,
    vae_pass,
)
from cola_train.randomness import Purpose, normal, round_up_to_draws, uniform


@dataclasses.dataclass(frozen=True)
class FlowDraws:
    """The addressed draws that flow matching needs beside its noise, of one noised copy after another."""

    t: Float[Tensor, "batch blocks"]  # in [0, 1]
    pinned: Bool[Tensor, "batch noised"]  # prompt positions: clean, t = 0, no loss
    sees_history: Bool[Tensor, "batch noised"] | None  # None where nothing is ever hidden


def flow_draws(config: FlowConfig, sample_index: Tensor, num_blocks: int, block_size: int, seed: int) -> FlowDraws:
    """Times, prompt blocks and hidden histories of each sample, for each of its noise_copies.

    A block is a prompt block with probability prompt_block_prob; its first k positions are then pinned, k uniform in
    1..block_size - 1.
    """
    # The first copy's draws are those of a run with one copy.
    copies = [_draws_of(config, sample_index, num_blocks, block_size, seed, copy) for copy in range(config.noise_copies)]
    shown = [draws.sees_history for draws in copies if draws.sees_history is not None]
    return FlowDraws(
        torch.cat([draws.t for draws in copies], dim=1),
        torch.cat([draws.pinned for draws in copies], dim=1),
        torch.cat(shown, dim=1) if shown else None,
    )


def _draws_of(config: FlowConfig, sample_index: Tensor, num_blocks: int, block_size: int, seed: int, copy: int) -> FlowDraws:
    start = copy * round_up_to_draws(num_blocks)

    def draw(purpose: Purpose) -> Tensor:
        return uniform(seed, purpose, sample_index, num_blocks, start)

    if config.time_distribution == "uniform":
        t = draw(Purpose.FLOW_TIME)
    else:
        t = logit_normal_time(normal(seed, Purpose.FLOW_TIME, sample_index, num_blocks, start), config.time_loc, config.time_scale)
    if config.timestep_per == "sample":
        t = t[:, :1].expand(-1, num_blocks)
    is_prompt = draw(Purpose.PROMPT_BLOCK) < config.prompt_block_prob
    num_pinned = 1 + (draw(Purpose.PROMPT_LENGTH) * (block_size - 1)).long()
    # With blocks of one latent there is no partial prompt.
    num_pinned = torch.where(is_prompt, num_pinned.clamp(max=block_size - 1), 0)
    place = torch.arange(block_size, device=sample_index.device)
    pinned = (place < num_pinned[..., None]).flatten(1)
    sees_history = None
    if config.history_dropout > 0:
        keeps = draw(Purpose.HISTORY_DROPOUT) >= config.history_dropout
        sees_history = keeps.repeat_interleave(block_size, dim=1)
    return FlowDraws(t, pinned, sees_history)


def position_times(draws: FlowDraws, block_size: int, config: FlowConfig) -> Times:
    """The distinct times of a batch (of each copy, or each block of it; then t = 0), and the index of every noised position's."""
    rows, blocks = draws.t.shape
    # The blocks of a copy share their time, or each has its own.
    sharing = blocks // config.noise_copies if config.timestep_per == "sample" else 1
    distinct = draws.t[:, ::sharing].flatten()
    index = torch.arange(len(distinct), device=draws.t.device).view(rows, -1).repeat_interleave(sharing * block_size, dim=1)
    index = torch.where(draws.pinned, len(distinct), index)
    return Times(torch.cat([distinct, distinct.new_zeros(1)]), index)


class Stage2Objective(nn.Module):
    """From a batch to its share of the step's losses; holds VAE, DiT and the frozen reference encoder.

    The reference encoder is a copy of the VAE's encoder at construction, so build this after loading stage 1.
    """

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
        """What this batch adds to each mean's denominator; the caller adds over micro-batches and processes."""
        config = self.config
        counts = vae_counts(batch, self.vae.config.patch_size, config, self.seed)
        counts["flow_latents"] = self._counted(batch, self._draws(batch)).sum()
        return counts

    def forward(self, batch: Batch, counts: Counts, train_vae: bool = True) -> Losses:
        """The losses of `batch`, each a sum over it divided by the step's `counts`.

        Terms: those of `vae_pass`; negative entropy E_q[log q] and KL(q || q_ref) (nats per token: summed over channels, divided by
        real tokens); flow_mse, the mean over counted latents and channels of (v_psi - (z_1 - z_0))^2.

        Args:
            train_vae: False for the frozen phases of Fix and Interval: the VAE only encodes, without gradient, and all its
                terms are left out.
        """
        return self._joint(batch, counts) if train_vae else self._frozen(batch, counts)

    def _frozen(self, batch: Batch, counts: Counts) -> Losses:
        config, patch_size = self.config, self.vae.config.patch_size
        with torch.no_grad():
            posterior = self.vae.encode(batch.tokens, latent_documents(batch, patch_size, config.mask_documents))
            if config.fixed_log_snr is not None:
                posterior = posterior.with_log_snr(config.fixed_log_snr)
            latents, channels = posterior.mean.shape[1:]
            z_0 = posterior.sample(standard_normal_latents(self.seed, Purpose.POSTERIOR_EPS, batch, latents, channels))
        return Losses({"flow_mse": self._flow_loss(batch, z_0, counts)}, self.weights(train_vae=False), {})

    def _joint(self, batch: Batch, counts: Counts) -> Losses:
        config, patch_size = self.config, self.vae.config.patch_size
        out = vae_pass(self.vae, batch, counts, config, self.seed)
        real = latent_mask(batch.loss_mask, patch_size)
        sums = {"negative_entropy_nats_per_token": (out.posterior.negative_entropy() * real).sum()}
        if self.reference_encoder is not None:
            sums["reference_kl_nats_per_token"] = (out.posterior.kl_to(self._reference(batch)) * real).sum()
        terms = {**out.terms, **{name: mean_share(name, total, counts) for name, total in sums.items()}}
        terms["flow_mse"] = self._flow_loss(batch, out.z_0, counts)
        return Losses(terms, self.weights(train_vae=True), out.metrics)

    def weights(self, train_vae: bool = True) -> dict[str, float]:
        """The weight of each term in the total."""
        config = self.config
        weights = {"flow_mse": config.flow_weight}
        if not train_vae:
            return weights
        weights["reconstruction_nats_per_token"] = config.vae_weight
        weights["negative_entropy_nats_per_token"] = config.vae_weight * config.entropy_weight
        if config.mask_weight > 0:
            weights["mask_nats_per_masked_token"] = config.vae_weight * config.mask_weight
        if self.reference_encoder is not None:
            weights["reference_kl_nats_per_token"] = config.reference_weight
        return weights

    def _reference(self, batch: Batch) -> Posterior:
        assert self.reference_encoder is not None
        config = self.config
        with torch.no_grad():
            document = latent_documents(batch, self.vae.config.patch_size, config.mask_documents)
            reference: Posterior = self.reference_encoder(batch.tokens, document)
        return reference if config.fixed_log_snr is None else reference.with_log_snr(config.fixed_log_snr)

    def _flow_loss(self, batch: Batch, z_0: Float[Tensor, "batch latents channels"], counts: Counts) -> Float[Tensor, ""]:
        config, copies = self.config, self.config.flow.noise_copies
        draws = self._draws(batch)
        times = position_times(draws, self.dit.config.block_size, config.flow)
        _, latents, channels = z_0.shape
        z_1 = standard_normal_latents(self.seed, Purpose.FLOW_NOISE, batch, latents, channels, copies)
        document = latent_documents(batch, self.vae.config.patch_size, config.mask_documents)
        # Figure 1: the target and the history are sg(z_0), pinned prompt positions too; only z_t may carry gradient to q_phi.
        detached = z_0.detach().repeat(1, copies, 1)
        path_start = z_0.repeat(1, copies, 1) if config.flow.grad_to_encoder else detached
        pinned = draws.pinned[..., None]
        z_t = torch.where(pinned, detached, interpolate(path_start, z_1, times.distinct[times.index][..., None]))
        velocity = self.dit.velocity(z_t, z_0.detach(), times, document, draws.sees_history)
        error = (velocity - velocity_target(detached, z_1)).square().mean(-1)
        return mean_share("flow_mse", (error * self._counted(batch, draws)).sum(), counts)

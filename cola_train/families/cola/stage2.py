"""Stage 2, VAE and DiT jointly (method, section 3).

L = lambda_VAE (reconstruction + beta E_q[log q] + lambda_mask L_mask) + lambda_fm L_FM
    + lambda_ref KL(q || q_ref)

A DiT with a codebook adds the cross-entropy of its posterior over tokens. With a teacher, a trained
DiT, L_FM is the distance from the teacher's velocity, which has no noise, instead of z_1 - z_0.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola.losses import FlowConfig, Stage2Config
from cola_train.families.cola.stage1 import (
    draw_copies,
    hold_log_snr,
    latent_mask,
    standard_normal_latents,
    vae_counts,
    vae_log_snr,
    vae_pass,
)
from cola_train.flow import interpolate, logit_normal_time, mean_velocity, velocity_target
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.models.text_vae import Posterior, TextVAE
from cola_train.objectives.objective import Objective, Term, documents_of
from cola_train.randomness import Purpose, normal, uniform


@dataclasses.dataclass(frozen=True)
class FlowDraws:
    """Draws for a batch, those of one noised copy of a row after another."""

    t: Float[Tensor, "batch blocks"]  # in [0, 1]
    pinned: Bool[Tensor, "batch noised"]  # prompt positions: clean, t = 0, no loss
    sees_history: Bool[Tensor, "batch noised"] | None  # None where nothing is ever hidden


def flow_draws(
    config: FlowConfig, sample_index: Tensor, num_blocks: int, block_size: int, seed: int
) -> FlowDraws:
    """Times, prompt blocks and hidden histories of each sample, for each of its noise_copies.

    A block is a prompt block with probability prompt_block_prob; its first k positions are then
    pinned, k uniform in 1..block_size - 1.
    """

    def draw(kind: Callable[..., Tensor], purpose: Purpose) -> Float[Tensor, "batch blocks"]:
        return draw_copies(kind, seed, purpose, sample_index, num_blocks, config.noise_copies)

    if config.time_distribution == "uniform":
        t = draw(uniform, Purpose.FLOW_TIME)
    else:
        z = draw(normal, Purpose.FLOW_TIME)
        t = logit_normal_time(z, config.time_loc, config.time_scale)
    if config.timestep_per == "sample":
        # The blocks of a copy share its first draw.
        t = t[:, ::num_blocks].repeat_interleave(num_blocks, dim=1)
    is_prompt = draw(uniform, Purpose.PROMPT_BLOCK) < config.prompt_block_prob
    num_pinned = 1 + (draw(uniform, Purpose.PROMPT_LENGTH) * (block_size - 1)).long()
    # With blocks of one latent there is no partial prompt.
    num_pinned = torch.where(is_prompt, num_pinned.clamp(max=block_size - 1), 0)
    place = torch.arange(block_size, device=sample_index.device)
    sees_history = None
    if config.history_dropout > 0:
        keeps = draw(uniform, Purpose.HISTORY_DROPOUT) >= config.history_dropout
        sees_history = keeps.repeat_interleave(block_size, dim=1)
    return FlowDraws(t, (place < num_pinned[..., None]).flatten(1), sees_history)


def position_times(draws: FlowDraws, block_size: int, config: FlowConfig) -> Times:
    """A batch's distinct times, t = 0 last, and which one each noised position has."""
    rows, blocks = draws.t.shape
    # The blocks of a copy share their time, or each has its own.
    sharing = blocks // config.noise_copies if config.timestep_per == "sample" else 1
    distinct = draws.t[:, ::sharing].flatten()
    index = torch.arange(len(distinct), device=draws.t.device).view(rows, -1)
    index = index.repeat_interleave(sharing * block_size, dim=1)
    index = torch.where(draws.pinned, len(distinct), index)
    return Times(torch.cat([distinct, distinct.new_zeros(1)]), index)


class Stage2Objective(Objective):
    """The losses of the VAE and the DiT that it holds, beside the frozen reference encoder.

    The reference encoder is a copy of the VAE's encoder at construction, so build this after
    loading stage 1. A teacher is frozen, too.
    """

    timed_forwards: ClassVar[Mapping[str, str]] = {
        "vae.encoder": "encode",
        "reference_encoder": "encode by the reference",
        "vae.decoder": "decode",
        "dit": "forward of the DiT",
        "teacher": "forward of the teacher",
    }

    def __init__(
        self,
        vae: TextVAE,
        dit: BlockCausalDiT,
        config: Stage2Config,
        seed: int,
        teacher: BlockCausalDiT | None = None,
    ) -> None:
        super().__init__()
        self.vae, self.dit, self.config, self.seed = vae, dit, config, seed
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        trains_vae = config.vae_strategy.mode != "fix"
        vae.requires_grad_(trains_vae)
        self.reference_encoder = None
        if trains_vae and config.reference_weight > 0:
            self.reference_encoder = copy.deepcopy(vae.encoder).requires_grad_(False)

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Real tokens, latents, masked tokens, and noised latents that the flow's loss counts."""
        counts = vae_counts(batch, self.vae.config.patch_size, self.config, self.seed)
        counts["flow_latents"] = self._counted(batch, self._draws(batch)).sum()
        return counts

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        """flow_mse and, where the VAE trains, its terms and metrics.

        flow_mse is the mean over counted latents and channels of (v_psi - (z_1 - z_0))^2, with
        flow.target=posterior of its mean given z_t and the posterior, and
        teacher_mse of (v_psi - v_teacher)^2; code_nats, over latents, of -log p(token | z_t,
        history) by a codebook. The VAE's are reconstruction, mask loss, negative entropy
        E_q[log q] and KL(q || q_ref), the last two in nats per token (summed over channels, divided
        by real tokens). In frozen phases of Fix and Interval the VAE only encodes, without
        gradient.
        """
        config = self.config
        if step is not None and not config.vae_strategy.trains_vae(step):
            return self._flow(batch, *self._frozen(batch))
        out = vae_pass(self.vae, batch, config, self.seed, config.vae_weight)
        negative_entropy = out.divergence(
            "negative_entropy",
            out.posterior.negative_entropy(),
            config.vae_weight * config.entropy_weight,
        )
        reference_kl = []
        if self.reference_encoder is not None:
            with torch.no_grad():
                reference = self.reference_encoder(batch.tokens, self._documents(batch))
                reference = hold_log_snr(reference, config)
            kl = out.posterior.kl_to(reference)
            reference_kl = [out.divergence("reference_kl", kl, config.reference_weight)]
        return [
            *self._flow(batch, out.posterior, out.z_0),
            out.reconstruction,
            negative_entropy,
            *out.mask,
            *reference_kl,
            *out.metrics,
        ]

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return vae_log_snr(means)

    def learning_rate_factor(self, name: str) -> float:
        """The VAE may learn at a rate of its own (vae_strategy.learning_rate_factor)."""
        return self.config.vae_strategy.learning_rate_factor if name.startswith("vae.") else 1.0

    def _draws(self, batch: Batch) -> FlowDraws:
        block_size = self.dit.config.block_size
        num_blocks = batch.tokens.shape[1] // (self.vae.config.patch_size * block_size)
        return flow_draws(self.config.flow, batch.sample_index, num_blocks, block_size, self.seed)

    def _counted(self, batch: Batch, draws: FlowDraws) -> Bool[Tensor, "batch noised"]:
        real = latent_mask(batch.loss_mask, self.vae.config.patch_size)
        if self.config.flow.learn_padding:
            size = self.dit.config.block_size
            real = real.unflatten(1, (-1, size)).any(-1).repeat_interleave(size, dim=1)
        return real.repeat(1, self.config.flow.noise_copies) & ~draws.pinned

    def _documents(self, batch: Batch) -> Int[Tensor, "batch latents"] | None:
        return documents_of(batch, self.vae.config.patch_size, self.config.mask_documents)

    @torch.no_grad()
    def _frozen(self, batch: Batch) -> tuple[Posterior, Float[Tensor, "batch latents channels"]]:
        """The posterior of a VAE that does not train, and a sample of it."""
        posterior = hold_log_snr(self.vae.encode(batch.tokens, self._documents(batch)), self.config)
        latents, channels = posterior.mean.shape[1:]
        eps = standard_normal_latents(self.seed, Purpose.POSTERIOR_EPS, batch, latents, channels)
        return posterior, posterior.sample(eps)

    def _flow(
        self, batch: Batch, posterior: Posterior, z_0: Float[Tensor, "batch latents channels"]
    ) -> list[Term]:
        config, copies = self.config, self.config.flow.noise_copies
        draws = self._draws(batch)
        times = position_times(draws, self.dit.config.block_size, config.flow)
        _, latents, channels = z_0.shape
        z_1 = standard_normal_latents(
            self.seed, Purpose.FLOW_NOISE, batch, latents, channels, copies
        )
        # Figure 1: the target and the history are sg(z_0), pinned prompt positions too; only z_t
        # may carry gradient to q_phi.
        detached = z_0.detach().repeat(1, copies, 1)
        path_start = z_0.repeat(1, copies, 1) if config.flow.grad_to_encoder else detached
        t = times.distinct[times.index][..., None]
        on_path = interpolate(path_start, z_1, t)
        z_t = torch.where(draws.pinned[..., None], detached, on_path)
        given, context = (z_t, z_0.detach(), times), (self._documents(batch), draws.sees_history)
        counted, nats = self._counted(batch, draws), None
        if self.dit.codebook is None:
            velocity = self.dit.velocity(*given, *context)
        else:
            tokens = batch.tokens.repeat(1, copies)
            velocity, nats = self.dit.velocity_and_nats(*given, tokens, *context)

        def distance(target: Tensor) -> Tensor:
            return ((velocity - target).square().mean(-1) * counted).sum()

        if config.flow.target == "sample":
            total = distance(velocity_target(detached, z_1))
        else:
            moments = posterior.mean.detach(), posterior.logvar.detach().exp()
            known = (moment.repeat(1, copies, 1) for moment in moments)
            target, variance = mean_velocity(z_t.detach(), t, *known)
            # What the mean leaves out is added, so that the loss is what it would be.
            total = distance(target) + (variance.mean(-1) * counted).sum()
        # With a teacher the loss that others have is a metric, to be compared.
        weight = config.flow_weight
        learned = self.teacher is None
        terms = [Term("flow", "mse", total, "flow_latents", weight if learned else None)]
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.velocity(*given, *context)
            terms.append(Term("teacher", "mse", distance(taught), "flow_latents", weight))
        if nats is not None:
            total = (nats * counted).sum()
            terms.append(Term("code", "nats", total, "flow_latents", config.code_weight))
        return terms

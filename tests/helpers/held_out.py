"""What a checkpoint makes of held-out rows, by the objective that trains it: what an inspection
finds another way.
"""

import dataclasses

import torch

from cola_train.data.batch import Batch, validation_batches
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.losses import FlowConfig, Stage2Config, VAEStrategyConfig
from cola_train.families.cola.stage1 import latent_mask, standard_normal_latents
from cola_train.families.cola.stage2 import Stage2Objective, flow_draws
from cola_train.flow import gaussian_baseline
from cola_train.randomness import Purpose


@dataclasses.dataclass(frozen=True)
class HeldOutFlow:
    """Flow matching on held-out rows."""

    loss: float  # mean squared error of the velocity, per latent channel
    # what a predictor would get that knows each channel's mean and variance
    # (flow.gaussian_baseline)
    bound: float


@torch.inference_mode()
def reconstruction_accuracy(
    checkpoint: ColaCheckpoint, data: PreparedData, num_rows: int, seed: int
) -> float:
    """Share of held-out tokens that come back from a posterior sample, likeliest token at each
    position.
    """
    vae, right, count = checkpoint.vae, 0, 0
    for batch in validation_batches(data, num_rows):
        posterior = vae.encode(batch.tokens)
        eps = standard_normal_latents(seed, Purpose.POSTERIOR_EPS, batch, *posterior.mean.shape[1:])
        found = vae.decode(posterior.sample(eps)).argmax(-1)
        right += int(((found == batch.tokens) & batch.loss_mask).sum())
        count += int(batch.loss_mask.sum())
    return right / count


@torch.inference_mode()
def held_out_flow(
    checkpoint: ColaCheckpoint, data: PreparedData, num_rows: int, flow: FlowConfig, seed: int
) -> HeldOutFlow:
    """The flow-matching loss of a frozen step and its mean-and-variance bound, over the same
    latents and times.
    """
    assert checkpoint.dit is not None
    frozen = Stage2Config(
        flow=flow, mask_weight=0.0, reference_weight=0.0, vae_strategy=VAEStrategyConfig(mode="fix")
    )
    objective = Stage2Objective(checkpoint.vae, checkpoint.dit, frozen, seed)
    error = count = 0.0
    latents, times = [], []
    for batch in validation_batches(data, num_rows):
        (term,) = objective(batch, step=0)
        error += float(term.sum)
        count += float(objective.counts(batch)["flow_latents"])
        z_0, t = _latents_and_times(objective, batch, seed)
        latents.append(z_0)
        times.append(t)
    variance = torch.cat(latents).double().var(dim=0, correction=0)
    return HeldOutFlow(loss=error / count, bound=gaussian_baseline(variance, torch.cat(times)))


def _latents_and_times(
    objective: Stage2Objective, batch: Batch, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """z_0 (latents, channels) and t (latents) of the positions that the loss counts."""
    vae, block_size = objective.vae, objective.dit.config.block_size
    posterior = vae.encode(batch.tokens)
    z_0 = posterior.sample(
        standard_normal_latents(seed, Purpose.POSTERIOR_EPS, batch, *posterior.mean.shape[1:])
    )
    draws = flow_draws(
        objective.config.flow, batch.sample_index, z_0.shape[1] // block_size, block_size, seed
    )
    counted = latent_mask(batch.loss_mask, vae.config.patch_size) & ~draws.pinned
    return z_0[counted], draws.t.repeat_interleave(block_size, dim=1)[counted]

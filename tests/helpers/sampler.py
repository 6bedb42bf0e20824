"""The sampler once more, for one prompt, without caches or batches: every pass reads the whole row
again.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.models.text_vae import TextVAE

BlockResult = tuple[Tensor, Tensor, list[int]]


def generate_alone(
    vae: TextVAE,
    dit: BlockCausalDiT,
    prompt: Sequence[int],
    config: SamplerConfig,
    pad: int,
    num_blocks: int,
    noise: Callable[[int], Tensor],
) -> list[BlockResult]:
    """Latents, logits and greedy ids of each generated block; `noise` gives a block's initial
    noise.
    """
    patch, size = vae.config.patch_size, dit.config.block_size
    width = max(1, -(-len(prompt) // (patch * size))) * patch * size
    latents = vae.encode(torch.tensor([[*prompt, *[pad] * (width - len(prompt))]])).mean[0]
    num_latents = -(-len(prompt) // patch)
    clean = latents[: num_latents // size * size]
    text = [*prompt, *[pad] * (width - len(prompt))][: len(clean) * patch]
    opening = list(prompt[len(text) :])
    known = latents[len(clean) : num_latents]
    seen: set[int] = set()
    results = []
    for number in range(num_blocks):
        z = _transport(dit, clean, known, config.noise_scale * noise(number), config)
        clean, known = torch.cat([clean, z]), z[:0]
        logits = vae.decode(clean[None])[0, -size * patch :]
        ids = [int(_penalized(row, seen, config.repetition_penalty).argmax()) for row in logits]
        seen |= set(ids)
        text += [*opening, *ids[len(opening) :]]
        opening = []
        if config.history == "reencoded":
            clean = vae.encode(torch.tensor([text])).mean[0]
        results.append((z, logits, ids))
    return results


def _transport(
    dit: BlockCausalDiT, clean: Tensor, known: Tensor, z: Tensor, config: SamplerConfig
) -> Tensor:
    n, before = config.num_steps, None
    for step in range(n):
        slope = _guided(dit, clean, known, z, 1 - step / n, config)
        if config.solver == "heun" and step < n - 1:
            slope = (
                slope + _guided(dit, clean, known, z - slope / n, 1 - (step + 1) / n, config)
            ) / 2
        now = slope
        if config.solver == "adams2" and before is not None:
            slope = 1.5 * now - 0.5 * before
        before = now
        z = z - slope / n
    return torch.cat([known, z[len(known) :]])


def _guided(
    dit: BlockCausalDiT, clean: Tensor, known: Tensor, z: Tensor, time: float, config: SamplerConfig
) -> Tensor:
    z = torch.cat([known, z[len(known) :]])
    t = torch.full((len(z),), time)
    t[: len(known)] = 0.0
    conditional = _velocity(dit, clean, z, t)
    low, high = config.guidance_interval
    if len(clean) == 0 or not low <= time <= high:
        return conditional
    alone = _velocity(dit, clean[:0], z, t)
    guided = alone + config.guidance_scale * (conditional - alone)
    ratio = conditional[len(known) :].std(correction=0) / guided[len(known) :].std(correction=0)
    return config.guidance_rescale * ratio * guided + (1 - config.guidance_rescale) * guided


def _velocity(dit: BlockCausalDiT, clean: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Of the last block of a row whose earlier blocks are `clean`."""
    row = torch.cat([clean, z])[None]
    index = torch.arange(row.shape[1])[None]
    times = torch.cat([torch.zeros(len(clean)), t, torch.zeros(1)])
    return dit.velocity(row, row, Times(times, index))[0, len(clean) :]


def _penalized(logits: Tensor, seen: set[int], penalty: float) -> Tensor:
    logits = logits.clone()
    for token in seen:
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    return logits

"""Held-out rows with posterior, sample and noise, always the same ones, and passes over them."""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from cola_train.config.evaluation import InspectionConfig
from cola_train.data.batch import Batch, validation_batches
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.stage1 import latent_mask, standard_normal_latents
from cola_train.flow import integrate
from cola_train.models.attention.masks import (
    document_positions,
    packed,
    packed_layout,
    visible_set_mask,
)
from cola_train.models.attention.rows import RowAttention
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.models.text_vae import Posterior, TextVAE
from cola_train.objectives.objective import documents_of
from cola_train.randomness import Purpose
from cola_train.solvers import time_grid

Latents = Float[Tensor, "batch latents channels"]
Documents = Int[Tensor, "batch latents"]

# Logits that are held at a time: 256 MB in fp32.
_MOST_LOGITS = 2**26


@dataclasses.dataclass(frozen=True)
class LatentRows:
    """A batch of held-out rows in latent space."""

    batch: Batch
    posterior: Posterior
    z_0: Latents  # a sample of the posterior
    z_1: Latents  # N(0, I)
    counted: Bool[Tensor, "batch latents"]  # False where all tokens are padding
    document: Documents | None  # None where a row is one sequence

    def select(self, values: Latents) -> Float64[Tensor, "counted channels"]:
        """The values of latents that count, on the CPU."""
        return values[self.counted].double().cpu()


def latent_rows(
    vae: TextVAE, data: PreparedData, config: InspectionConfig, mask_documents: bool = False
) -> Iterator[LatentRows]:
    """Held-out rows in batches on the VAE's device; their draws are addressed by row.

    With `mask_documents` documents of a row are kept apart.
    """
    num_rows, seed = min(config.num_rows, data.num_rows(VALIDATION)), config.seed
    device = vae.encoder.final_layer.weight.device
    for batch in validation_batches(data, num_rows, config.batch_size):
        batch = Batch(*(tensor.to(device) for tensor in batch))
        document = documents_of(batch, vae.config.patch_size, mask_documents)
        posterior = vae.encode(batch.tokens, document)
        shape = posterior.mean.shape[1:]
        yield LatentRows(
            batch,
            posterior,
            posterior.sample(standard_normal_latents(seed, Purpose.POSTERIOR_EPS, batch, *shape)),
            standard_normal_latents(seed, Purpose.FLOW_NOISE, batch, *shape),
            latent_mask(batch.loss_mask, vae.config.patch_size),
            document,
        )


def likeliest_tokens(
    vae: TextVAE, hidden: Float[Tensor, "batch seq dim"]
) -> Int[Tensor, "batch seq"]:
    """The likeliest token at each position, without holding all logits at once."""
    parts = hidden.flatten(0, 1).split(max(1, _MOST_LOGITS // vae.config.vocab_size))
    tokens = torch.cat([vae.decoder.head(part).argmax(-1) for part in parts])
    return tokens.unflatten(0, hidden.shape[:2])


def same_time(z: Latents, t: float) -> Times:
    """Time t at every position, and 0 for clean history."""
    return Times(
        torch.tensor([t, 0.0], device=z.device),
        torch.zeros(z.shape[:2], dtype=torch.long, device=z.device),
    )


def transport_all_blocks(
    dit: BlockCausalDiT, history: Latents, z_1: Latents, document: Documents | None, num_steps: int
) -> Latents:
    """Each block by Euler steps from its noise in `z_1`, without guidance; all at once.

    A block attends to the clean blocks of `history` before it: the result is the sampler's, had
    these been its prompt.
    """
    times = time_grid(num_steps)

    def velocity(z: Tensor, place: int) -> Tensor:
        return dit.velocity(z, history, same_time(z, times[place]), document)

    return integrate(velocity, z_1, num_steps, "euler")


def decode_after_history(
    vae: TextVAE, history: Latents, blocks: Latents, document: Documents | None, block_size: int
) -> Int[Tensor, "batch seq"]:
    """The likeliest tokens of each of `blocks` after the blocks of `history` before it.

    One packed pass of the decoder: noised blocks first, as in training.
    """
    num_latents, device = history.shape[1], history.device
    num_clean = num_latents - block_size
    places = packed_layout(num_latents, block_size, document, device=device)
    index = torch.arange(num_latents, device=device)[None]
    positions = index if document is None else document_positions(document)
    # Inside a block of the DiT the decoder looks back only, by blocks of its own.
    own_block = packed(index, index[:, :num_clean]) // vae.config.block_size
    visible = visible_set_mask(places, places) & (own_block[:, None, :] <= own_block[:, :, None])
    hidden = vae.decoder(
        torch.cat([blocks, history[:, :num_clean]], dim=1),
        positions=packed(positions, positions[:, :num_clean]),
        attention=RowAttention(visible[:, None]),
    )
    return likeliest_tokens(vae, hidden[:, : num_latents * vae.config.patch_size])

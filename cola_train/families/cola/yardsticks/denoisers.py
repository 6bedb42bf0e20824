"""The best velocities of whoever knows the codes and which token follows which, exactly, by tiles.

A tensor over all tokens is only ever held for as many latents as are in a tile, so memory does not
grow with their number; it does grow with a block's length, for a block is one chain.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.likelihood.token_tables import BigramModel
from cola_train.models.codebook import Codebook

# Tokens x latents that are held at a time: 64 MB in fp32. Fewer make sparse products slow.
_MOST_VALUES = 2**24


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Noised latents in blocks of any size, each after a clean history."""

    z_t: Float[Tensor, "blocks size channels"]
    t: Float[Tensor, "blocks size"]
    before: Int[Tensor, " blocks"]  # the last clean token; any where the block starts a text
    # where nothing that stands before is known: the beginning of a row or document
    starts: Bool[Tensor, "blocks size"]
    counted: Bool[Tensor, "blocks size"]  # False where padding stands, which tells nothing

    @classmethod
    def of(
        cls,
        z_t: Float[Tensor, "rows latents channels"],
        t: Float[Tensor, "rows latents"],
        tokens: Int[Tensor, "rows latents"],
        starts: Bool[Tensor, "rows latents"],
        counted: Bool[Tensor, "rows latents"],
        size: int,
    ) -> "Blocks":
        """All blocks of `size` latents of rows, each after the row's clean tokens before it."""
        before = torch.cat([tokens[:, :1], tokens[:, size - 1 : -1 : size]], dim=1)
        parts = (x.unflatten(1, (-1, size)).flatten(0, 1) for x in (z_t, t, starts, counted))
        z_t, t, starts, counted = parts
        return cls(z_t, t, before.flatten(), starts, counted)


def unigram_velocity(codebook: Codebook, blocks: Blocks) -> Float[Tensor, "blocks size channels"]:
    """E[z_1 - z_0 | z_t], tokens being drawn independently by the codebook's log p."""
    at_once = max(1, _MOST_VALUES // len(codebook.codes))
    flat = (blocks.z_t.flatten(0, 1).split(at_once), blocks.t.flatten().split(at_once))
    log_p = codebook.log_p[None]
    parts = [
        codebook.velocity(z_t, t, codebook.mean_code(z_t, t, log_p))
        for z_t, t in zip(*flat, strict=True)
    ]
    return torch.cat(parts).view_as(blocks.z_t)


def bigram_velocity(
    codebook: Codebook, bigram: BigramModel, blocks: Blocks
) -> Float[Tensor, "blocks size channels"]:
    """E[z_1 - z_0 | all z_t of the block, the token before it], tokens being a Markov chain."""
    at_once = max(1, _MOST_VALUES // (len(codebook.codes) * blocks.t.shape[1]))
    fields = [getattr(blocks, field.name).split(at_once) for field in dataclasses.fields(blocks)]
    codes = torch.cat([_mean_codes(codebook, bigram, Blocks(*part)) for part in zip(*fields)])
    flat = codebook.velocity(blocks.z_t.flatten(0, 1), blocks.t.flatten(), codes.flatten(0, 1))
    return flat.view_as(blocks.z_t)


def _mean_codes(
    codebook: Codebook, bigram: BigramModel, blocks: Blocks
) -> Float[Tensor, "blocks size channels"]:
    """E[c_k | the block's z_t, the token before it] by a forward and a backward pass.

    Both are rescaled at each place. Nothing underflows that matters: the smoothing leaves each
    token a probability in the order of 1e-12 at least, and the likeliest emission is 1.
    """
    size, unigram = blocks.t.shape[1], bigram.p[:, None]
    emissions, forward = list[Tensor](), list[Tensor]()
    # In place, where a tensor is read no more: passes over memory are most of the time.
    for place in range(size):
        likelihood = codebook.log_likelihood(blocks.z_t[:, place], blocks.t[:, place]).T
        emission = likelihood.sub_(likelihood.amax(0)).exp_()
        emission[:, ~blocks.counted[:, place]] = 1.0
        emissions.append(emission)
        known = bigram.forward(forward[-1]) if forward else bigram.after(blocks.before)
        known = torch.where(blocks.starts[:, place], unigram, known)
        forward.append(_to_shares(known.mul_(emission)))
    codes, backward = list[Tensor](), torch.ones_like(forward[-1])
    for place in reversed(range(size)):
        codes.append(_to_shares(forward.pop().mul_(backward)).T @ codebook.codes)
        if place > 0:
            told = bigram.backward(backward.mul_(emissions.pop()))
            backward = torch.where(blocks.starts[:, place], 1.0, told.div_(told.amax(0)))
    return torch.stack(codes[::-1], dim=1)


def _to_shares(weights: Float[Tensor, "tokens blocks"]) -> Float[Tensor, "tokens blocks"]:
    return weights.div_(weights.sum(0))

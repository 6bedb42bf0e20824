"""Who may attend to whom: one predicate that makes every mask of the VAE, of DiT training and of sampling."""

import dataclasses

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Places:
    """Where each position of a row stands. All fields broadcast against each other.

    Attributes:
        block: index of the position's block within its row.
        noised: True for a noised copy, False for a clean position (everything in the VAE is clean).
        document: index of the document within the row, or None where attention may cross documents.
        sees_history: False at noised positions whose history is hidden (history dropout), or None where nothing is hidden.
    """

    block: Int[Tensor, "#batch seq"]
    noised: Bool[Tensor, "#batch seq"]
    document: Int[Tensor, "batch seq"] | None = None
    sees_history: Bool[Tensor, "batch seq"] | None = None


def visible_set_mask(query: Places, key: Places) -> Bool[Tensor, "batch query key"]:
    """V_b of the paper: a query sees earlier clean blocks, and of its own block the positions of its own kind.

    So clean block b sees clean blocks <= b; noised block b sees clean blocks < b and itself, bidirectionally.
    """
    block_q, block_k = query.block[:, :, None], key.block[:, None, :]
    noised_q, noised_k = query.noised[:, :, None], key.noised[:, None, :]
    history = ~noised_k & (block_k < block_q)
    if query.sees_history is not None:
        history = history & query.sees_history[:, :, None]
    visible = history | ((noised_q == noised_k) & (block_k == block_q))
    if query.document is not None:
        assert key.document is not None
        visible = visible & (query.document[:, :, None] == key.document[:, None, :])
    return visible


def blocks_of(num_positions: int, block_size: int, device: torch.device | str = "cpu") -> Int[Tensor, "1 seq"]:
    """Block index of each of `num_positions` positions of a row."""
    return (torch.arange(num_positions, device=device) // block_size)[None]


def document_positions(document: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """RoPE positions that restart at each document. `document` does not decrease along a row."""
    index = torch.arange(document.shape[1], device=document.device).expand_as(document)
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def clean_places(
    num_positions: int, block_size: int, document: Int[Tensor, "batch seq"] | None = None, device: torch.device | str = "cpu"
) -> Places:
    """A row of clean positions only: the VAE's attention, and the DiT's over history."""
    block = blocks_of(num_positions, block_size, device)
    return Places(block=block, noised=torch.zeros_like(block, dtype=torch.bool), document=document)


def packed_places(
    num_latents: int,
    block_size: int,
    document: Int[Tensor, "batch seq"] | None = None,
    sees_history: Bool[Tensor, "batch seq"] | None = None,
    device: torch.device | str = "cpu",
) -> Places:
    """The DiT's training row: clean blocks 1..B-1, then all B noised blocks; 2 num_latents - block_size positions.

    Args:
        num_latents: L, a multiple of block_size.
        document: document of each latent (batch, L).
        sees_history: for each noised position (batch, L), False hides its history.
    """
    num_clean = num_latents - block_size
    block = blocks_of(num_latents, block_size, device)
    noised = torch.zeros(1, num_clean + num_latents, dtype=torch.bool, device=device)
    noised[:, num_clean:] = True
    if sees_history is not None:
        clean_sees = torch.ones(sees_history.shape[0], num_clean, dtype=torch.bool, device=device)
        sees_history = torch.cat([clean_sees, sees_history], dim=1)
    return Places(
        block=torch.cat([block[:, :num_clean], block], dim=1),
        noised=noised,
        document=None if document is None else torch.cat([document[:, :num_clean], document], dim=1),
        sees_history=sees_history,
    )

"""Who may attend to whom: one predicate makes all masks of the VAE, DiT training and sampling."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where each position of a row stands; fields broadcast, most are of shape (#batch, seq)."""

    block: Int[Tensor, "*#places"]  # index within the row
    copy: Int[Tensor, "*#places"]  # 0: clean (all of the VAE's are), k: of the k-th noised copy
    document: Int[Tensor, "*#places"] | None = None  # index; None: attention may cross documents
    # False where history is hidden (history dropout); None: nothing is.
    sees_history: Bool[Tensor, "*#places"] | None = None

    def map(self, of: Callable[[Tensor], Tensor]) -> "TokenLayout":
        """The layout with `of` applied to each field that is not None."""
        document = None if self.document is None else of(self.document)
        sees_history = None if self.sees_history is None else of(self.sees_history)
        return TokenLayout(of(self.block), of(self.copy), document, sees_history)


def visible_set_mask(query: TokenLayout, key: TokenLayout) -> Bool[Tensor, "batch query key"]:
    """`is_visible` for every pair of a query and a key of a row."""
    return is_visible(query.map(lambda x: x[:, :, None]), key.map(lambda x: x[:, None]))


def is_visible(query: TokenLayout, key: TokenLayout) -> Tensor:
    """V_b of the paper: earlier clean blocks, and the own block in the own copy; fields broadcast.

    So clean block b sees clean blocks <= b; noised block b sees clean blocks < b and itself,
    bidirectionally.
    """
    history = (key.copy == 0) & (key.block < query.block)
    if query.sees_history is not None:
        history = history & query.sees_history
    visible = history | ((query.copy == key.copy) & (key.block == query.block))
    if query.document is not None:
        visible = visible & (query.document == key.document)
    return visible


def document_positions(document: Int[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """RoPE positions that restart at each document. `document` does not decrease along a row."""
    index = torch.arange(document.shape[1], device=document.device).expand_as(document)
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def row_positions(
    seq: int, document: Int[Tensor, "batch seq"] | None, device: torch.device
) -> Int[Tensor, "#batch seq"]:
    """RoPE positions of clean rows; they restart at each document where `document` is given."""
    if document is None:
        return torch.arange(seq, device=device)[None]
    return document_positions(document)


def clean_layout(
    num_positions: int,
    block_size: int,
    document: Int[Tensor, "batch seq"] | None = None,
    device: torch.device | str = "cpu",
) -> TokenLayout:
    """A row of clean positions only: the VAE's attention, and the DiT's over history."""
    block = (torch.arange(num_positions, device=device) // block_size)[None]
    return TokenLayout(block=block, copy=torch.zeros_like(block), document=document)


def packed_layout(
    num_latents: int,
    block_size: int,
    document: Int[Tensor, "batch latents"] | None = None,
    sees_history: Bool[Tensor, "batch noised"] | None = None,
    device: torch.device | str = "cpu",
    copies: int = 1,
) -> TokenLayout:
    """The DiT's training row: all blocks of each noised copy, then the clean blocks but the last.

    The last clean block is no block's history. A row has (copies + 1) num_latents - block_size
    positions; the noised ones come first, so that those whose output is read are the first ones.

    `num_latents` is a multiple of `block_size`; False in `sees_history` hides the history of a
    noised position.
    """
    num_clean = num_latents - block_size
    block = clean_layout(num_latents, block_size, device=device).block
    copy = torch.arange(1, copies + 1, device=device).repeat_interleave(num_latents)[None]
    if sees_history is not None:
        clean_sees = sees_history.new_ones(sees_history.shape[0], num_clean)
        sees_history = torch.cat([sees_history, clean_sees], dim=1)
    return TokenLayout(
        block=packed(block, block[:, :num_clean], copies),
        copy=torch.cat([copy, copy.new_zeros(1, num_clean)], dim=1),
        document=None if document is None else packed(document, document[:, :num_clean], copies),
        sees_history=sees_history,
    )


def packed(
    noised: Int[Tensor, "batch latents"], clean: Int[Tensor, "batch clean"], copies: int = 1
) -> Int[Tensor, "batch seq"]:
    """Values of a packed row, the same for each noised copy; seq = copies x latents + clean."""
    return torch.cat([noised.repeat(1, copies), clean], dim=1)

"""Token statistics of training rows: how often each token stands, and which one follows which."""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from cola_train.data.batch import Batch, training_batches
from cola_train.data.packing import TRAIN
from cola_train.data.prepared import PreparedData

_COUNTED_AT_ONCE = 1024  # rows; each time all pairs are sorted anew

Rows = Int[Tensor, "rows seq"]
Flags = Bool[Tensor, "rows seq"]
ByToken = Float[Tensor, "tokens chains"]


class PairTally:
    """Counts tokens, and pairs of neighbors that were seen: memory grows with those alone."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.count = torch.zeros(num_tokens, dtype=torch.int64)
        # a pair's first token times num_tokens plus its second, sorted, and how often it was seen
        self.pairs = torch.zeros(0, dtype=torch.int64)
        self.pair_count = torch.zeros(0, dtype=torch.int64)

    def add(self, tokens: Rows, counted: Flags, starts: Flags) -> None:
        """Add rows, on the CPU.

        Tokens count where `counted`; at `starts` nothing of what stands before is known.
        """
        self.count += torch.bincount(tokens[counted], minlength=self.num_tokens)
        follows = counted[:, 1:] & counted[:, :-1] & ~starts[:, 1:]
        new = (tokens[:, :-1] * self.num_tokens + tokens[:, 1:])[follows]
        pairs, place = torch.cat([self.pairs, new]).unique(return_inverse=True)
        known = torch.cat([self.pair_count, torch.ones_like(new)])
        self.pairs = pairs
        self.pair_count = torch.zeros_like(pairs).index_add_(0, place, known)

    def unigram(self) -> Float64[Tensor, " tokens"]:
        """p(k), each token being seen half a time more (Krichevsky and Trofimov)."""
        smoothed = self.count.double() + 0.5
        return smoothed / smoothed.sum()


@dataclasses.dataclass(frozen=True)
class BigramModel:
    """p(j | k) = seen(k, j) + backoff(k) p(j) after Witten and Bell (1991).

    seen(k, j) = n(k, j) / (n(k) + T(k)) and backoff(k) = T(k) / (n(k) + T(k)), with n(k) pairs that
    begin with k, of T(k) kinds. A product with it is a sparse one plus one of rank 1: work grows
    with pairs seen plus tokens, not with tokens squared.
    """

    p: Float[Tensor, " tokens"]  # where nothing is known
    backoff: Float[Tensor, " tokens"]
    pairs: Int[Tensor, " pairs"]  # as of PairTally
    seen: Float[Tensor, " pairs"]

    @classmethod
    def of(
        cls, tally: PairTally, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "BigramModel":
        """The model of what was counted; in fp64 on the CPU unless told otherwise."""
        number, first = tally.num_tokens, tally.pairs // tally.num_tokens
        times = torch.zeros(number, dtype=torch.float64).index_add_(
            0, first, tally.pair_count.double()
        )
        kinds = torch.bincount(first, minlength=number).double()
        whole = (times + kinds).clamp(min=1)
        # After a token that nothing was seen to follow, nothing is known.
        backoff = torch.where(times > 0, kinds / whole, 1.0)
        values = (tally.unigram(), backoff, tally.pair_count / whole[first])
        p, backoff, seen = (value.to(device, dtype) for value in values)
        return cls(p, backoff, tally.pairs.to(device), seen)

    def after(self, tokens: Int[Tensor, " chains"]) -> ByToken:
        """p(. | token), a column each."""
        ends = torch.searchsorted(
            self.pairs, torch.stack([tokens, tokens + 1]) * len(self.p), out_int32=False
        )
        lengths = ends[1] - ends[0]
        column = torch.arange(len(tokens), device=tokens.device).repeat_interleave(lengths)
        within = torch.arange(len(column), device=tokens.device)
        within -= (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        place = ends[0].repeat_interleave(lengths) + within
        found = self.p[:, None] * self.backoff[tokens]
        found[self.pairs[place] % len(self.p), column] += self.seen[place]
        return found

    def forward(self, weights: ByToken) -> ByToken:
        """sum_k weights(k) p(j | k): what is known of the next token."""
        rest = (self.backoff[:, None] * weights).sum(0)
        return torch.sparse.mm(self._matrix.t(), weights) + self.p[:, None] * rest

    def backward(self, weights: ByToken) -> ByToken:
        """sum_j p(j | k) weights(j): what is known of the token before."""
        rest = (self.p[:, None] * weights).sum(0)
        return torch.sparse.mm(self._matrix, weights) + self.backoff[:, None] * rest

    def nats(
        self, tokens: Rows, starts: Flags
    ) -> tuple[Float[Tensor, "rows seq"], Float[Tensor, "rows seq"]]:
        """-log p(token) of unigram and bigram; the two are the same at `starts`."""
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)
        wanted = before * len(self.p) + tokens
        place = torch.searchsorted(self.pairs, wanted).clamp(max=max(0, len(self.pairs) - 1))
        unigram = self.p[tokens]
        bigram = self.backoff[before] * unigram
        if len(self.pairs):
            bigram += torch.where(self.pairs[place] == wanted, self.seen[place], 0.0)
        return -unigram.log(), -torch.where(starts, unigram, bigram).log()

    @functools.cached_property
    def _matrix(self) -> Tensor:
        number = len(self.p)
        places = torch.stack([self.pairs // number, self.pairs % number])
        return torch.sparse_coo_tensor(
            places, self.seen, (number, number), is_coalesced=True, check_invariants=True
        )


def training_rows(data: PreparedData, most_rows: int | None) -> list[int]:
    """The rows that tables are counted on: at most so many (None: all), evenly spread."""
    found = data.num_rows(TRAIN)
    return spread(range(found), found if most_rows is None else most_rows)


def count_pairs(
    data: PreparedData, rows: Sequence[int], num_tokens: int, mask_documents: bool
) -> PairTally:
    """Tokens and pairs of training `rows`; with `mask_documents` none across documents."""
    tally = PairTally(num_tokens)
    for batch in training_batches(data, rows, _COUNTED_AT_ONCE):
        tally.add(batch.tokens, batch.loss_mask, text_starts(batch, mask_documents))
    return tally


def text_starts(batch: Batch, mask_documents: bool) -> Flags:
    """Where nothing before is known: rows' beginnings, with `mask_documents` documents' too."""
    starts = torch.zeros_like(batch.loss_mask)
    starts[:, 0] = True
    if mask_documents:
        starts[:, 1:] = batch.document_ids[:, 1:] != batch.document_ids[:, :-1]
    return starts


def spread(rows: Sequence[int], most: int) -> list[int]:
    """At most so many of `rows`, evenly spread."""
    number = min(len(rows), most)
    return [rows[place * len(rows) // number] for place in range(number)]

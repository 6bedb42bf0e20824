"""A judge of texts that shares nothing with the models: an n-gram model of the training token ids.

Modified Kneser-Ney smoothing, interpolated (Chen and Goodman, "An empirical study of smoothing
techniques for language modeling", 1998), with three discounts: for a context h and a token w, with
h' = h without its oldest token,

    P(w | h) = (a(h w) - D(a(h w))) / a(h .) + left(h) P(w | h')

where a counts occurrences at the longest order and different tokens before h w at every other,
a(h .) is its sum over w, and left(h) is the sum of the discounts over a(h .). The empty context
backs off to the uniform distribution: no id has probability 0.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

_NO_KEY = np.iinfo(np.int64).max
_NOTHING = -1  # stands before the first token of a text
# Discounts of a count of 0, 1, 2 and 3 or more where the counts of counts are too few or too uneven
# to estimate them.
_DEFAULT_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one length by rank; each array's last place is for those never seen.

    Attributes:
        keys: (rank of all but the last token) x vocab_size + the last token, ascending.
        share: (a(h w) - D) / a(h .); 0 if never seen.
        left: left(h); 1 of a context that was never followed.
    """

    keys: Int64[np.ndarray, " ngrams_and_none"]
    share: Float64[np.ndarray, " ngrams_and_none"]
    left: Float64[np.ndarray, " contexts_and_none"]


@dataclasses.dataclass(frozen=True)
class NgramJudge:
    """P(next token | the order - 1 tokens before), over all ids below `vocab_size`."""

    vocab_size: int
    orders: tuple[_Order, ...]  # n-grams of 1, 2, ... tokens

    @classmethod
    def train(
        cls, rows: Int64[np.ndarray, "rows seq"], vocab_size: int, pad_token_id: int, order: int
    ) -> "NgramJudge":
        """Count n-grams of up to `order` tokens within each row.

        Separators are tokens like others. No n-gram holds padding: as a token it has the least
        probability, and it ends a context. A row's first tokens are counted only in n-grams that
        fit into the row.
        """
        assert order >= 1
        assert not rows.size or (rows.min() >= 0 and rows.max() < vocab_size)
        orders: list[_Order] = []
        # The rank of the n-gram that starts at each place, and whether it is free of padding.
        ranks, whole = np.zeros_like(rows), np.ones(rows.shape, dtype=bool)
        keys, num_contexts = np.zeros(1, dtype=np.int64), 1
        for n in range(1, order + 1):
            last = rows[:, n - 1 :]
            whole = whole[:, : last.shape[1]] & (last != pad_token_id)
            places = np.flatnonzero(whole)
            longer = (ranks[:, : last.shape[1]] * vocab_size + last)[whole]
            longer_keys, first, inverse, counts = np.unique(
                longer, return_index=True, return_inverse=True, return_counts=True
            )
            if n > 1:
                # Each different n-gram is one different token before the (n-1)-gram that starts a
                # place later.
                row, column = np.divmod(places[first], max(last.shape[1], 1))
                before = np.bincount(ranks[row, column + 1], minlength=len(keys))
                orders.append(_smoothed(keys, before, num_contexts, vocab_size))
                num_contexts = len(keys)
            keys, ranks = longer_keys, np.full(last.shape, -1, dtype=np.int64)
            ranks[whole] = inverse
        orders.append(_smoothed(keys, counts, num_contexts, vocab_size))
        return cls(vocab_size, tuple(orders))

    def sha256(self) -> str:
        """The hash of all that it judges by, in hexadecimal."""
        digest = hashlib.sha256(f"{self.vocab_size} {len(self.orders)}".encode())
        for order in self.orders:
            for array in dataclasses.astuple(order):
                digest.update(array.data)
        return digest.hexdigest()

    def nats(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> Float64[np.ndarray, " tokens"]:
        """-log P of each token of `continuation` after `context` and those before it, nats."""
        longest = len(self.orders) - 1
        before = [_NOTHING] * longest + [*context]
        text = np.array([*before[len(before) - longest :], *continuation], dtype=np.int64)
        assert (text < self.vocab_size).all()
        assert (text[longest:] >= 0).all()
        places = np.arange(longest, len(text))
        probability = np.full(len(places), 1 / self.vocab_size)
        for n, order in enumerate(self.orders, start=1):
            rank = np.zeros_like(places)
            for length in range(1, n):
                rank = self._rank(length, rank, text[places - n + length])
            share = order.share[self._rank(n, rank, text[places])]
            probability = order.left[rank] * probability + share
        return -np.log(probability)

    def _rank(
        self, n: int, rank: Int64[np.ndarray, " places"], last: Int64[np.ndarray, " places"]
    ) -> Int64[np.ndarray, " places"]:
        """The rank of (n-1)-grams, given by rank, with `last` after them; -1 if never seen."""
        keys = self.orders[n - 1].keys
        wanted = np.where((rank >= 0) & (last >= 0), rank * self.vocab_size + last, -1)
        found = np.searchsorted(keys, wanted)
        return np.where(keys[found] == wanted, found, -1)


def _smoothed(
    keys: Int64[np.ndarray, " ngrams"],
    counts: Int64[np.ndarray, " ngrams"],
    num_contexts: int,
    vocab_size: int,
) -> _Order:
    """The order of n-grams whose a(h w) are `counts`."""
    taken = _discounts(counts)[np.minimum(counts, 3)]
    context = keys // vocab_size
    total = np.bincount(context, weights=counts, minlength=num_contexts)
    total_taken = np.bincount(context, weights=taken, minlength=num_contexts)
    left = np.ones(num_contexts + 1)
    np.divide(total_taken, total, out=left[:-1], where=total > 0)
    share = np.zeros(len(keys) + 1)
    # An n-gram that only starts rows has nothing before it: a = 0, and its context may sum to 0.
    np.divide(counts - taken, total[context], out=share[:-1], where=counts > 0)
    return _Order(np.append(keys, _NO_KEY), share, left)


def _discounts(counts: Int64[np.ndarray, " ngrams"]) -> Float64[np.ndarray, "4"]:
    """D of counts 0, 1, 2 and 3 or more.

    D(k) = k - (k + 1) Y n_{k+1} / n_k with Y = n_1 / (n_1 + 2 n_2), n_k n-grams having count k.
    """
    of_count = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    if not of_count.all():
        return np.array(_DEFAULT_DISCOUNTS)
    k = np.arange(1, 4)
    share = of_count[0] / (of_count[0] + 2 * of_count[1])
    discounts = k - (k + 1) * share * of_count[1:] / of_count[:-1]
    # A discount of 0 would leave nothing to what a context was never followed by.
    return np.array([0.0, *discounts]) if (discounts > 0).all() else np.array(_DEFAULT_DISCOUNTS)

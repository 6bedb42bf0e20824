"""A judge of texts that no model trained here shares anything with: an n-gram model of the training
split's token ids.

Interpolated Kneser-Ney with the three discounts of Chen and Goodman, "An empirical study of
smoothing techniques for language modeling" (1998), called modified there: of a context h and a
token w, with h' = h without its oldest token,

    P(w | h) = (a(h w) - D(a(h w))) / a(h .) + left(h) P(w | h')

where a counts occurrences at the longest order and different tokens before h w at every other, a(h
.) is its sum over w, and left(h) is what the discounts took, over a(h .). The empty context goes on
to the uniform distribution: no id has probability 0.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

_NO_KEY = np.iinfo(np.int64).max
_NOTHING = -1  # stands before the first token of a text
# What is taken off a count of 0, 1, 2 and 3 or more where the counts of counts are too few or too
# uneven to estimate it.
_DEFAULT_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)


@dataclasses.dataclass(frozen=True)
class _Order:
    """The n-grams of one length, known by their rank; each array has one more place at its end, for
    what was never seen.
    """

    # ascending: rank of all but the last token x vocab_size + the last
    keys: Int64[np.ndarray, " ngrams_and_none"]
    share: Float64[np.ndarray, " ngrams_and_none"]  # (a(h w) - D) / a(h .); 0 if never seen
    # left(h); 1 of a context that was never followed
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
        probability of all, as a context it ends the context. A row's first tokens are counted where
        they stand behind enough others.
        """
        assert order >= 1
        assert not rows.size or (rows.min() >= 0 and rows.max() < vocab_size)
        orders: list[_Order] = []
        # Of the n-gram that starts at each place: its rank, and whether it is free of padding.
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

    def nats(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> Float64[np.ndarray, " tokens"]:
        """-log P of each token of `continuation`, given what stands before it there and in
        `context`; nats.
        """
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
            probability = (
                order.left[rank] * probability + order.share[self._rank(n, rank, text[places])]
            )
        return -np.log(probability)

    def _rank(
        self, n: int, rank: Int64[np.ndarray, " places"], last: Int64[np.ndarray, " places"]
    ) -> Int64[np.ndarray, " places"]:
        """The n-grams of an (n-1)-gram's rank and a token after it; -1, the place of the never
        seen, if it is one.
        """
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
    """`counts` is a(h w)."""
    taken = _discounts(counts)[np.minimum(counts, 3)]
    context = keys // vocab_size
    total = np.bincount(context, weights=counts, minlength=num_contexts)
    left = np.ones(num_contexts + 1)
    np.divide(
        np.bincount(context, weights=taken, minlength=num_contexts),
        total,
        out=left[:-1],
        where=total > 0,
    )
    share = np.zeros(len(keys) + 1)
    # An n-gram that stands at the start of rows alone has nothing before it: a = 0, and its context
    # may have a sum of 0.
    np.divide(counts - taken, total[context], out=share[:-1], where=counts > 0)
    return _Order(np.append(keys, _NO_KEY), share, left)


def _discounts(counts: Int64[np.ndarray, " ngrams"]) -> Float64[np.ndarray, "4"]:
    """D of 0, 1, 2 and 3 or more: Y = n_1 / (n_1 + 2 n_2), D(k) = k - (k + 1) Y n_{k+1} / n_k, n_k
    the n-grams of count k.
    """
    of_count = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    if not of_count.all():
        return np.array(_DEFAULT_DISCOUNTS)
    k = np.arange(1, 4)
    share = of_count[0] / (of_count[0] + 2 * of_count[1])
    discounts = k - (k + 1) * share * of_count[1:] / of_count[:-1]
    # A discount of 0 would leave nothing to what a context was never followed by.
    return np.array([0.0, *discounts]) if (discounts > 0).all() else np.array(_DEFAULT_DISCOUNTS)

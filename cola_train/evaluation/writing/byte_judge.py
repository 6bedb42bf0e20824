"""A judge that knows no tokens: texts of models with different tokenizers stand on one scale.

An n-gram model (ngram.py) of the bytes of the training text, with a line break for each separator,
judges the same number of bytes of every continuation.
"""

from collections.abc import Sequence

import numpy as np

from cola_train.evaluation.writing.ngram import NgramJudge
from cola_train.evaluation.writing.statistics import Statistic, distinct, ratio
from cola_train.evaluation.writing.words import words

ORDER = 6  # the longest n-gram, bytes
_BETWEEN_TEXTS = 256  # the judge's padding: no n-gram holds it
# The judge then takes seconds and about 1 GB.
_MOST_TRAINING_BYTES = 2**23


def train_byte_judge(texts: Sequence[str]) -> NgramJudge:
    """Count the n-grams of at most about 2^23 bytes of the texts, which are then evenly spaced."""
    encoded = [text.encode() for text in texts]
    every = -(-sum(map(len, encoded)) // _MOST_TRAINING_BYTES)
    parts = [
        np.append(np.frombuffer(text, dtype=np.uint8).astype(np.int64), _BETWEEN_TEXTS)
        for text in encoded[:: max(1, every)]
    ]
    return NgramJudge.train(np.concatenate(parts)[None], 257, _BETWEEN_TEXTS, ORDER)


def byte_statistics(
    judge: NgramJudge, openings: Sequence[str], texts: Sequence[str], num_bytes: int
) -> dict[str, Statistic]:
    """The metrics of the first `num_bytes` bytes of each text after its opening, by name."""
    cut = [text.encode()[:num_bytes] for text in texts]
    nats = [
        judge.nats([*opening.encode()], [*part]).sum()
        for opening, part in zip(openings, cut, strict=True)
    ]
    lengths = [len(part) for part in cut]
    return {
        "judge_nats_per_byte": ratio(nats, lengths),
        "bytes_per_continuation": ratio(lengths, [1] * len(cut)),
        "distinct_4word_share": distinct([words(part.decode(errors="ignore")) for part in cut]),
    }

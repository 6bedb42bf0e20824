"""Figures that can be compared across families of models, whose losses cannot: all are of what a
model writes.

Every model continues the same held-out openings by the same number of tokens, and only the ids it
gives back are looked at. Beside each figure of written text stands the same figure of the text that
really follows. None of them is enough alone: an n-gram judge likes bland and repeated text better
than real text. A good model comes near real text in all of them.
"""

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from cola_train.bootstrap import bootstrap_generator
from cola_train.config.settings import require
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.ngram import NgramJudge
from cola_train.evaluation.writing.words import words

# (prompts as ids, new tokens) -> each prompt's new ids, so many at most. A text that is shorter or
# holds the separator ends there.
Generator = Callable[[Sequence[Sequence[int]], int], list[list[int]]]

_SEED = 0
_NUM_RESAMPLES = 200
_FEWEST_OPENINGS = 4  # two in each half
# What the judge and the list of known words may learn from, so that they take seconds and about 1
# GB.
_MOST_TRAINING_TOKENS = 2**23


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure, its bootstrap standard error over openings, and the number of tokens, n-grams,
    words or openings it is of.
    """

    value: float
    standard_error: float
    count: int


@dataclasses.dataclass(frozen=True)
class Figures:
    """What `compare` finds, by name.

    next_word_accuracy: share of openings after which the first word, taken greedily, is the real
        one but for case; it must begin at once and end within the new tokens.

    Of the sampled text, and with the prefix `held_out_` of the real one:
        judge_nats_per_token: -log P by an n-gram model of the training rows, per token; the
            separator that ends a text is one.
        repeated_4gram_share: of 4-grams, those that stand earlier in the same opening or
            continuation.
        distinct_4gram_share: different 4-grams of all continuations over all their 4-grams. Its
            standard error takes the other continuations as given.
        known_word_share: of words, those that are in the training rows.
        tokens_per_continuation: below `num_new_tokens` as far as texts end.
        unigram_divergence, bigram_divergence: Jensen-Shannon divergence from the real text's tokens
            or pairs of tokens, nats, 0 to log 2. So few tokens look different even where their
            distributions are the same; therefore the continuations of half of the openings stand
            against the real ones of the other half, both ways, and `held_out_` gives the floor.
    """

    num_openings: int
    num_new_tokens: int
    estimates: dict[str, Estimate]

    def to_json(self) -> dict[str, int | dict[str, float | int]]:
        """One flat object: the two numbers, and each estimate as value, standard_error and
        count.
        """
        estimates = {
            name: dataclasses.asdict(estimate) for name, estimate in self.estimates.items()
        }
        return {
            "num_openings": self.num_openings,
            "num_new_tokens": self.num_new_tokens,
            **estimates,
        }


@dataclasses.dataclass(frozen=True)
class Openings:
    """Beginnings of held-out rows and what really follows each."""

    prompts: list[list[int]]
    endings: list[list[int]]  # num_new ids, or fewer of which the last is the separator


@dataclasses.dataclass(frozen=True)
class _Statistic:
    value: Callable[[Float64[np.ndarray, " openings"]], float]  # of how often each opening is taken
    count: int


def compare(
    greedy: Generator, sampled: Generator, data: PreparedData, config: ComparisonConfig
) -> Figures:
    """Let a model continue held-out openings, and judge what it writes.

    Args:
        greedy: takes likeliest tokens; asked for the next word alone.
        sampled: writes the text that all else is measured on.
        data: held-out rows give the openings, training rows teach the judge (at most 2^23 tokens of
            them, rows evenly spaced).
        config: how many openings and new tokens, and the judge's order.

    Raises:
        UserError: more new tokens than half a row has, or too few rows for the openings.
    """
    openings = held_out_openings(data, config.num_openings, config.num_new_tokens)
    next_words = _continuations(greedy, openings, data, config.num_new_tokens)
    written = _continuations(sampled, openings, data, config.num_new_tokens)
    rows, tokenizer = _training_rows(data), data.tokenizer
    judge = NgramJudge.train(
        rows, data.manifest.vocab_size, tokenizer.pad_token_id, config.judge_order
    )
    known = frozenset(word for row in rows.tolist() for word in words(_row_text(row, tokenizer)))
    right = [
        first_word(a, tokenizer) == first_word(b, tokenizer)
        for a, b in zip(next_words, openings.endings, strict=True)
    ]
    statistics = {"next_word_accuracy": _ratio(right, [1] * len(right))}
    for prefix, texts in (("", written), ("held_out_", openings.endings)):
        nats = [
            judge.nats(prompt, text).sum()
            for prompt, text in zip(openings.prompts, texts, strict=True)
        ]
        found = [words(_text(text, tokenizer)) for text in texts]
        statistics |= {
            f"{prefix}judge_nats_per_token": _ratio(nats, [len(text) for text in texts]),
            f"{prefix}repeated_4gram_share": _repetition(openings.prompts, texts),
            f"{prefix}distinct_4gram_share": _distinct(texts),
            f"{prefix}known_word_share": _ratio(
                [sum(word in known for word in some) for some in found], [*map(len, found)]
            ),
            f"{prefix}tokens_per_continuation": _ratio(
                [len(text) for text in texts], [1] * len(texts)
            ),
            f"{prefix}unigram_divergence": _divergence(texts, openings.endings),
            f"{prefix}bigram_divergence": _divergence(
                _pairs(openings, texts), _pairs(openings, openings.endings)
            ),
        }
    resamples = _resamples(len(openings.prompts))
    estimates = {name: _estimate(statistic, resamples) for name, statistic in statistics.items()}
    return Figures(len(openings.prompts), config.num_new_tokens, estimates)


def held_out_openings(data: PreparedData, count: int, num_new: int) -> Openings:
    """Openings of about half a row, each cut before a token that begins a word which ends within
    `num_new` tokens.

    Rows without such a place in their second quarter, or with padding before it, are left out. The
    choice depends on the data and `num_new` alone, and fewer openings are the first of more.

    Raises:
        UserError: `num_new` is more than half a row, or there are not `count` and not even a few
            such rows.
    """
    half, num_rows = data.manifest.seq_len // 2, data.num_rows(VALIDATION)
    require(
        num_new <= half,
        f"num_new_tokens must be at most half of a row of the data, {half} tokens in "
        f"{data.folder}, not {num_new}; lower it, or prepare data with a larger seq_len.",
    )
    require(
        count >= _FEWEST_OPENINGS,
        f"num_openings must be at least {_FEWEST_OPENINGS} for a standard error, not {count}.",
    )
    found = Openings([], [])
    for index in random.Random(_SEED).sample(range(num_rows), num_rows):
        row = data.row(VALIDATION, index)[0].tolist()
        for cut in range(half, half // 2, -1):
            ending = _until_end(row[cut : cut + num_new], num_new, data)
            if (
                data.tokenizer.pad_token_id not in row[:cut]
                and first_word(ending, data.tokenizer) is not None
            ):
                found.prompts.append(row[:cut])
                found.endings.append(ending)
                break
        if len(found.prompts) == count:
            break
    require(
        len(found.prompts) >= _FEWEST_OPENINGS,
        f"A comparison needs at least {_FEWEST_OPENINGS} held-out rows that can be cut before a "
        f"word; {data.folder} has {len(found.prompts)} of {num_rows} held-out rows. Prepare data "
        "with a larger held_out_share.",
    )
    return found


def first_word(ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
    """The word, in lower case, that a continuation begins with; None if it begins with anything but
    a space and a letter, or if
    the word may go on after its last token."""
    text = _text(ids, tokenizer)
    found = words(text) if text[:1] == " " and text[1:2].isalpha() else []
    return found[0] if found else None


def _continuations(
    generator: Generator, openings: Openings, data: PreparedData, num_new: int
) -> list[list[int]]:
    texts = generator(openings.prompts, num_new)
    assert len(texts) == len(openings.prompts)
    assert all(len(text) <= num_new for text in texts)
    return [_until_end(text, num_new, data) for text in texts]


def _until_end(ids: Sequence[int], num_new: int, data: PreparedData) -> list[int]:
    """Up to the first separator, which a text that stopped early gets if it was left out."""
    # A model may have more ids than its tokenizer. Text has them as little as padding, so the judge
    # takes them for that.
    eos, pad, vocab_size = (
        data.tokenizer.eos_token_id,
        data.tokenizer.pad_token_id,
        data.manifest.vocab_size,
    )
    kept = [
        token if 0 <= token < vocab_size else pad
        for token in itertools.takewhile(lambda token: token != eos, ids)
    ]
    return kept if len(kept) == num_new else [*kept, eos]


def _text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decoded, so that a word at the end looks whole only if it is: with a line break for the
    separator, or without what may be
    the inside of a word, an apostrophe or the first bytes of a letter."""
    text = tokenizer.decode(ids)
    return text + "\n" if ids[-1] == tokenizer.eos_token_id else text.rstrip("\ufffd'’")


def _training_rows(data: PreparedData) -> Int64[np.ndarray, "rows seq"]:
    num_rows = data.num_rows(TRAIN)
    num_taken = min(num_rows, max(1, _MOST_TRAINING_TOKENS // data.manifest.seq_len))
    return np.stack(
        [data.row(TRAIN, place * num_rows // num_taken)[0] for place in range(num_taken)]
    )


def _row_text(row: Sequence[int], tokenizer: Tokenizer) -> str:
    """With a line break for each separator: left out, it would join the words on its sides."""
    edges = [
        0,
        *(place for place, token in enumerate(row) if token == tokenizer.eos_token_id),
        len(row),
    ]
    return "\n".join(tokenizer.decode(row[start:end]) for start, end in itertools.pairwise(edges))


def _grams(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return zip(ids, ids[1:], ids[2:], ids[3:])


def _pairs(openings: Openings, texts: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Neighboring tokens of each continuation, its opening's last token and its first among
    them.
    """
    return [
        [*itertools.pairwise([prompt[-1], *text])]
        for prompt, text in zip(openings.prompts, texts, strict=True)
    ]


def _ratio(parts: Sequence[float], wholes: Sequence[int]) -> _Statistic:
    """The openings' parts together over their wholes together; 0 of 0 is 0."""
    part, whole = np.array(parts, dtype=np.float64), np.array(wholes, dtype=np.float64)
    return _Statistic(
        lambda weights: float(weights @ part) / max(float(weights @ whole), 1.0), sum(wholes)
    )


def _repetition(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> _Statistic:
    repeated, total = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        grams, num_written = [*_grams([*prompt, *text])], max(len(text) - 3, 0)
        first = {gram: place for place, gram in reversed([*enumerate(grams)])}
        written = range(len(grams) - num_written, len(grams))
        repeated.append(sum(first[grams[place]] < place for place in written))
        total.append(num_written)
    return _ratio(repeated, total)


def _distinct(texts: Sequence[Sequence[int]]) -> _Statistic:
    grams = [[*_grams(text)] for text in texts]
    uses = Counter(gram for some in grams for gram in some)
    # A 4-gram's uses share it: the parts of all openings add up to the number of different ones.
    return _ratio([sum(1 / uses[gram] for gram in some) for some in grams], [*map(len, grams)])


def _divergence(texts: Sequence[Sequence[object]], real: Sequence[Sequence[object]]) -> _Statistic:
    """Between what two sets of texts are made of; one half's texts against the other half's real
    ones, the mean of both ways.
    """
    kinds = {
        kind: index
        for index, kind in enumerate({kind: None for text in (*texts, *real) for kind in text})
    }
    half = len(texts) // 2

    def half_of(
        some: Sequence[Sequence[object]], chosen: range
    ) -> Callable[[Float64[np.ndarray, " openings"]], np.ndarray]:
        index = np.array([kinds[kind] for opening in chosen for kind in some[opening]])
        owner = np.repeat(np.array(chosen), [len(some[opening]) for opening in chosen])

        def distribution(
            weights: Float64[np.ndarray, " openings"],
        ) -> Float64[np.ndarray, " kinds"]:
            counts = np.bincount(index, weights[owner], minlength=len(kinds))
            return counts / counts.sum()

        return distribution

    halves = (range(half), range(half, len(texts)))
    ways = [(half_of(texts, mine), half_of(real, other)) for mine, other in (halves, halves[::-1])]
    return _Statistic(
        lambda weights: (
            sum(_jensen_shannon(mine(weights), other(weights)) for mine, other in ways) / 2
        ),
        sum(map(len, texts)),
    )


def _jensen_shannon(p: Float64[np.ndarray, " kinds"], q: Float64[np.ndarray, " kinds"]) -> float:
    middle = (p + q) / 2
    return (
        sum(
            float((side[side > 0] * np.log(side[side > 0] / middle[side > 0])).sum())
            for side in (p, q)
        )
        / 2
    )


def _resamples(num_openings: int) -> Float64[np.ndarray, "resamples openings"]:
    """How often each opening is drawn, as many draws in each half as it has openings: no half is
    ever empty.
    """
    half, generator = num_openings // 2, bootstrap_generator()
    draws = [
        generator.multinomial(size, np.full(size, 1 / size), size=_NUM_RESAMPLES)
        for size in (half, num_openings - half)
    ]
    return np.concatenate(draws, axis=1).astype(np.float64)


def _estimate(
    statistic: _Statistic, resamples: Float64[np.ndarray, "resamples openings"]
) -> Estimate:
    spread = np.std([statistic.value(weights) for weights in resamples], ddof=1)
    return Estimate(statistic.value(np.ones(resamples.shape[1])), float(spread), statistic.count)

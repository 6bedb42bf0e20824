"""Metrics that can be compared across families, whose losses cannot: of what a model writes.

Every model continues the same held-out openings by the same number of tokens, and only the ids it
gives back are looked at. Beside each metric of written text stands the same metric of the text that
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
from cola_train.evaluation.writing.config import FEWEST_OPENINGS, ComparisonConfig
from cola_train.evaluation.writing.ngram import NgramJudge
from cola_train.evaluation.writing.words import decode_ending, decode_row, first_word, words

_Texts = Sequence[Sequence[int]]
# (prompts as ids, new tokens) -> each prompt's new ids, at most so many. A text that is shorter or
# holds the separator ends there.
Generator = Callable[[_Texts, int], list[list[int]]]
_Weights = Float64[np.ndarray, " openings"]  # how often each opening is drawn
_Shares = Float64[np.ndarray, " kinds"]
_Statistic = tuple[Callable[[_Weights], float], int]  # and its count, as in `Estimate`

_SEED = 0
_NUM_RESAMPLES = 200
# Of the judge and the list of known words, which then take seconds and about 1 GB.
_MOST_TRAINING_TOKENS = 2**23


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric with its bootstrap standard error over openings.

    `count` is the number of tokens, n-grams, words or openings that it is of.
    """

    value: float
    standard_error: float
    count: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The metrics that `compare` finds, by name.

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


def compare(
    greedy: Generator, sampled: Generator, data: PreparedData, config: ComparisonConfig
) -> Comparison:
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
    num_new, tokenizer = config.num_new_tokens, data.tokenizer
    prompts, endings = held_out_openings(data, config.num_openings, num_new)
    next_words = _continuations(greedy, prompts, data, num_new)
    written = _continuations(sampled, prompts, data, num_new)
    rows = _training_rows(data)
    judge = NgramJudge.train(
        rows, data.manifest.vocab_size, tokenizer.pad_token_id, config.judge_order
    )
    known = {word for row in rows.tolist() for word in words(decode_row(row, tokenizer))}
    right = [
        first_word(found, tokenizer) == first_word(real, tokenizer)
        for found, real in zip(next_words, endings, strict=True)
    ]
    each = [1] * len(prompts)
    statistics = {"next_word_accuracy": _ratio(right, each)}
    for prefix, texts in (("", written), ("held_out_", endings)):
        lengths = [len(text) for text in texts]
        nats = [judge.nats(*pair).sum() for pair in zip(prompts, texts, strict=True)]
        spelled = [words(decode_ending(text, tokenizer)) for text in texts]
        num_known = [sum(word in known for word in some) for some in spelled]
        pairs, real_pairs = _pairs(prompts, texts), _pairs(prompts, endings)
        statistics |= {
            f"{prefix}judge_nats_per_token": _ratio(nats, lengths),
            f"{prefix}repeated_4gram_share": _repetition(prompts, texts),
            f"{prefix}distinct_4gram_share": _distinct(texts),
            f"{prefix}known_word_share": _ratio(num_known, [len(some) for some in spelled]),
            f"{prefix}tokens_per_continuation": _ratio(lengths, each),
            f"{prefix}unigram_divergence": _divergence(texts, endings),
            f"{prefix}bigram_divergence": _divergence(pairs, real_pairs),
        }
    resamples = _resamples(len(prompts))
    estimates = {}
    for name, (value, count) in statistics.items():
        spread = float(np.std([value(weights) for weights in resamples], ddof=1))
        estimates[name] = Estimate(value(np.ones(len(prompts))), spread, count)
    return Comparison(len(prompts), num_new, estimates)


def held_out_openings(
    data: PreparedData, count: int, num_new: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Openings of about half a row, each cut before a word that ends within `num_new` tokens, and
    what really follows each: `num_new` ids, or fewer of which the last is the separator.

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
    prompts, endings, pad = [], [], data.tokenizer.pad_token_id
    for index in random.Random(_SEED).sample(range(num_rows), num_rows):
        row = data.row(VALIDATION, index)[0].tolist()
        for cut in range(half, half // 2, -1):
            ending = _until_end(row[cut : cut + num_new], num_new, data)
            if pad not in row[:cut] and first_word(ending, data.tokenizer) is not None:
                prompts.append(row[:cut])
                endings.append(ending)
                break
        if len(prompts) == count:
            break
    require(
        len(prompts) >= FEWEST_OPENINGS,
        f"A comparison needs at least {FEWEST_OPENINGS} held-out rows that can be cut before a "
        f"word; {data.folder} has {len(prompts)} of {num_rows} held-out rows. Prepare data "
        "with a larger held_out_share.",
    )
    return prompts, endings


def _continuations(
    generator: Generator, prompts: _Texts, data: PreparedData, num_new: int
) -> list[list[int]]:
    texts = generator(prompts, num_new)
    assert len(texts) == len(prompts)
    assert all(len(text) <= num_new for text in texts)
    return [_until_end(text, num_new, data) for text in texts]


def _until_end(ids: Sequence[int], num_new: int, data: PreparedData) -> list[int]:
    """Up to the first separator, which a text that stopped early gets if it was left out."""
    eos, pad = data.tokenizer.eos_token_id, data.tokenizer.pad_token_id
    # A model may have more ids than its tokenizer. Text contains them as little as padding, which
    # the judge therefore takes them for.
    kept = [
        token if 0 <= token < data.manifest.vocab_size else pad
        for token in itertools.takewhile(lambda token: token != eos, ids)
    ]
    return kept if len(kept) == num_new else [*kept, eos]


def _training_rows(data: PreparedData) -> Int64[np.ndarray, "rows seq"]:
    num_rows = data.num_rows(TRAIN)
    num_taken = min(num_rows, max(1, _MOST_TRAINING_TOKENS // data.manifest.seq_len))
    places = [number * num_rows // num_taken for number in range(num_taken)]
    return np.stack([data.row(TRAIN, place)[0] for place in places])


def _grams(ids: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return zip(ids, ids[1:], ids[2:], ids[3:])


def _pairs(prompts: _Texts, texts: _Texts) -> list[list[tuple[int, int]]]:
    """Neighboring tokens of each continuation, also its prompt's last token and its first."""
    return [[*itertools.pairwise([prompt[-1], *text])] for prompt, text in zip(prompts, texts)]


def _ratio(parts: Sequence[float], wholes: Sequence[int]) -> _Statistic:
    """The openings' parts together over their wholes together; 0 of 0 is 0."""
    part, whole = np.array(parts, dtype=np.float64), np.array(wholes, dtype=np.float64)
    return lambda weights: float(weights @ part) / max(float(weights @ whole), 1.0), sum(wholes)


def _repetition(prompts: _Texts, texts: _Texts) -> _Statistic:
    repeated, total = [], []
    for prompt, text in zip(prompts, texts, strict=True):
        grams, num_written = [*_grams([*prompt, *text])], max(len(text) - 3, 0)
        first = {gram: place for place, gram in reversed([*enumerate(grams)])}
        written = range(len(grams) - num_written, len(grams))
        repeated.append(sum(first[grams[place]] < place for place in written))
        total.append(num_written)
    return _ratio(repeated, total)


def _distinct(texts: _Texts) -> _Statistic:
    grams = [[*_grams(text)] for text in texts]
    uses = Counter(gram for some in grams for gram in some)
    # A 4-gram's uses share it: the parts of all openings add up to the number of different ones.
    return _ratio([sum(1 / uses[gram] for gram in some) for some in grams], [*map(len, grams)])


def _divergence(texts: Sequence[Sequence[object]], real: Sequence[Sequence[object]]) -> _Statistic:
    """Between one half's texts and the other half's real ones, the mean of both ways."""
    kinds = dict.fromkeys(kind for text in (*texts, *real) for kind in text)
    numbers = {kind: number for number, kind in enumerate(kinds)}

    def shares_of(some: Sequence[Sequence[object]], chosen: range) -> Callable[[_Weights], _Shares]:
        index = np.array([numbers[kind] for opening in chosen for kind in some[opening]])
        owner = np.repeat(np.array(chosen), [len(some[opening]) for opening in chosen])

        def shares(weights: _Weights) -> _Shares:
            counts = np.bincount(index, weights[owner], minlength=len(numbers))
            return counts / counts.sum()

        return shares

    halves = (range(len(texts) // 2), range(len(texts) // 2, len(texts)))
    ways = [
        (shares_of(texts, mine), shares_of(real, other)) for mine, other in (halves, halves[::-1])
    ]

    def value(weights: _Weights) -> float:
        return sum(_jensen_shannon(p(weights), q(weights)) for p, q in ways) / 2

    return value, sum(map(len, texts))


def _jensen_shannon(p: _Shares, q: _Shares) -> float:
    middle, total = (p + q) / 2, 0.0
    for side in (p, q):
        seen = side > 0
        total += float((side[seen] * np.log(side[seen] / middle[seen])).sum())
    return total / 2


def _resamples(num_openings: int) -> Float64[np.ndarray, "resamples openings"]:
    """How often each opening is drawn: each half is resampled by itself, so that none is empty."""
    half, generator = num_openings // 2, bootstrap_generator()
    draws = [
        generator.multinomial(size, np.full(size, 1 / size), size=_NUM_RESAMPLES)
        for size in (half, num_openings - half)
    ]
    return np.concatenate(draws, axis=1).astype(np.float64)

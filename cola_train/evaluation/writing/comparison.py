"""Metrics that can be compared across families, whose losses cannot: of what a model writes.

Every model continues the same held-out openings by the same number of tokens, and only the ids it
gives back are looked at. Beside each metric of written text stands the same metric of the text that
really follows. None of them is enough alone: an n-gram judge likes bland and repeated text better
than real text. A good model comes near real text in all of them.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence, Set

import numpy as np
from jaxtyping import Int64

from cola_train.config.settings import require
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.byte_judge import byte_statistics, train_byte_judge
from cola_train.evaluation.writing.config import FEWEST_OPENINGS, ComparisonConfig
from cola_train.evaluation.writing.model_judge import ModelJudge
from cola_train.evaluation.writing.ngram import NgramJudge
from cola_train.evaluation.writing.statistics import (
    Difference,
    Estimate,
    Statistic,
    Texts,
    difference,
    distinct,
    divergence,
    mean_entropy,
    pairs_of,
    ratio,
    repetition,
    resamples,
)
from cola_train.evaluation.writing.words import decode_ending, decode_row, first_word, words

# (prompts as ids, new tokens) -> each prompt's new ids, at most so many. A text that is shorter or
# holds the separator ends there.
Generator = Callable[[Texts, int], list[list[int]]]
Writer = tuple[Generator, Generator]  # takes likeliest tokens; writes the text that is judged

_SEED = 0
_HELD_OUT = "held_out_"
# Of the judge and the list of known words, which then take seconds and about 1 GB.
_MOST_TRAINING_TOKENS = 2**23


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The metrics that `compare` finds, by name.

    next_word_accuracy: share of openings after which the first word, taken greedily, is the real
        one but for case; it must begin at once and end within the new tokens.

    Of the sampled text, and with the prefix `held_out_` of the real one:
        judge_nats_per_token: -log P by an n-gram model of the training rows, per token; the
            separator that ends a text is one.
        judge_nats_per_byte: -log P by an n-gram model of the bytes of the training rows, per byte
            of the first `num_bytes` of each text: models of different tokenizers can be compared.
        bytes_per_continuation: below `num_bytes` as far as texts are shorter.
        model_judge_nats_per_byte: the same of the whole text by another model, where one judges
            (model_judge.py).
        distinct_4word_share: of 4 words in a row in these bytes, the different ones.
        repeated_4gram_share: of 4-grams, those that stand earlier in the same opening or
            continuation.
        distinct_4gram_share: different 4-grams of all continuations over all their 4-grams.
        continuation_entropy: of the shares of a continuation's own tokens, nats, the mean over
            continuations.
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


@dataclasses.dataclass(frozen=True)
class Judges:
    """What training rows teach of text: two n-gram judges, and the words that there are.

    `model`, where given, has learned from other text.
    """

    tokens: NgramJudge
    bytes: NgramJudge
    known_words: Set[str]
    model: ModelJudge | None = None

    @classmethod
    def train(
        cls, data: PreparedData, config: ComparisonConfig, model: ModelJudge | None = None
    ) -> "Judges":
        """From at most 2^23 tokens of the training rows, rows evenly spaced."""
        rows, tokenizer = _training_rows(data), data.tokenizer
        texts = [decode_row(row, tokenizer) for row in rows.tolist()]
        return cls(
            NgramJudge.train(
                rows, data.manifest.vocab_size, tokenizer.pad_token_id, config.judge_order
            ),
            train_byte_judge(texts),
            {word for text in texts for word in words(text)},
            model,
        )


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
    judges = Judges.train(data, config)
    return compare_in_pairs([(greedy, sampled)], judges, data, config)[0][0]


def compare_in_pairs(
    writers: Sequence[Writer], judges: Judges, data: PreparedData, config: ComparisonConfig
) -> tuple[list[Comparison], list[dict[str, Difference]]]:
    """`compare` for each writer, and the first's metrics less each other's, by name.

    Differences are of what a model writes, not of the real text, which is the same for all.
    """
    num_new, tokenizer = config.num_new_tokens, data.tokenizer
    prompts, endings = held_out_openings(data, config.num_openings, num_new)
    openings = [decode_row(prompt, tokenizer) for prompt in prompts]

    def measure(greedy: Generator, sampled: Generator) -> dict[str, Statistic]:
        next_words = continuations(greedy, prompts, data, num_new)
        written = continuations(sampled, prompts, data, num_new)
        right = [
            first_word(found, tokenizer, prompt) == first_word(real, tokenizer, prompt)
            for prompt, found, real in zip(prompts, next_words, endings, strict=True)
        ]
        each = [1] * len(prompts)
        statistics = {"next_word_accuracy": ratio(right, each)}
        for prefix, texts in (("", written), (_HELD_OUT, endings)):
            lengths = [len(text) for text in texts]
            nats = [judges.tokens.nats(*pair).sum() for pair in zip(prompts, texts, strict=True)]
            decoded = [
                decode_ending(text, tokenizer, prompt)
                for prompt, text in zip(prompts, texts, strict=True)
            ]
            spelled = [words(text) for text in decoded]
            num_known = [sum(word in judges.known_words for word in some) for some in spelled]
            pairs, real_pairs = pairs_of(prompts, texts), pairs_of(prompts, endings)
            of_bytes = byte_statistics(judges.bytes, openings, decoded, config.num_bytes)
            statistics |= {f"{prefix}{name}": one for name, one in of_bytes.items()}
            if judges.model is not None:
                of_model = judges.model.nats_per_byte(prompts, texts, tokenizer)
                statistics[f"{prefix}model_judge_nats_per_byte"] = of_model
            statistics |= {
                f"{prefix}judge_nats_per_token": ratio(nats, lengths),
                f"{prefix}repeated_4gram_share": repetition(prompts, texts),
                f"{prefix}distinct_4gram_share": distinct(texts),
                f"{prefix}continuation_entropy": mean_entropy(texts),
                f"{prefix}known_word_share": ratio(num_known, [len(some) for some in spelled]),
                f"{prefix}tokens_per_continuation": ratio(lengths, each),
                f"{prefix}unigram_divergence": divergence(texts, endings),
                f"{prefix}bigram_divergence": divergence(pairs, real_pairs),
            }
        return statistics

    measured = [measure(*writer) for writer in writers]
    # Every opening is drawn once in the mean.
    changes = resamples(len(prompts)) - 1
    comparisons = []
    for statistics in measured:
        estimates = {
            name: Estimate(one.value, float(np.std(changes @ one.influences, ddof=1)), one.count)
            for name, one in statistics.items()
        }
        comparisons.append(Comparison(len(prompts), num_new, estimates))
    first, *others = measured
    names = [name for name in first if not name.startswith(_HELD_OUT)]
    return comparisons, [
        {name: difference(first[name], other[name], changes) for name in names} for other in others
    ]


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
            ending = until_end(row[cut : cut + num_new], num_new, data)
            if pad not in row[:cut] and first_word(ending, data.tokenizer, row[:cut]) is not None:
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


def continuations(
    generator: Generator, prompts: Texts, data: PreparedData, num_new: int
) -> list[list[int]]:
    """What follows each prompt, up to the first separator."""
    texts = generator(prompts, num_new)
    assert len(texts) == len(prompts)
    assert all(len(text) <= num_new for text in texts)
    return [until_end(text, num_new, data) for text in texts]


def until_end(ids: Sequence[int], num_new: int, data: PreparedData) -> list[int]:
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

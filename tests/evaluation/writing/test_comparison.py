"""What models write, measured: on writers whose figures are known, and against the definitions
written out.
"""

import dataclasses
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import entropy

from cola_train.config.data import CorpusConfig, PrepareConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing import comparison
from cola_train.evaluation.writing.comparison import Generator, compare, held_out_openings
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.ngram import NgramJudge
from cola_train.evaluation.writing.words import first_word, words

NUM_NEW = 12
CONFIG = ComparisonConfig(num_openings=40, num_new_tokens=NUM_NEW)


@pytest.fixture
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


@pytest.fixture
def prepare_again(prepared_folder: Path, tmp_path: Path) -> Callable[..., PreparedData]:
    """Prepare the same text, or another, with the same tokenizer and other settings."""

    def build(text: str | None = None, **settings: int | float) -> PreparedData:
        book = prepared_folder.parent / "book.txt"
        if text is not None:
            book = tmp_path / "text.txt"
            book.write_text(text, encoding="utf-8")
        corpus = CorpusConfig(inputs=[str(book)])
        tokenizer, out = str(prepared_folder.parent / "tokenizer.json"), tmp_path / "rows"
        prepare(PrepareConfig(out=str(out), tokenizer=tokenizer, corpus=corpus, **settings))
        return PreparedData.open(out)

    return build


def writes(texts: list[list[int]]) -> Generator:
    return lambda prompts, num_new: texts


def real(data: PreparedData) -> list[list[int]]:
    return held_out_openings(data, CONFIG.num_openings, NUM_NEW)[1]


def wild(data: PreparedData) -> list[list[int]]:
    """Real continuations of other openings, some of their tokens replaced, some repeated, some cut
    short.
    """
    generator = np.random.default_rng(5)
    texts = [*real(data)[7:], *real(data)[:7]]
    for text in texts[::3]:
        text[1:9:2] = generator.integers(4, data.manifest.vocab_size, len(text[1:9:2])).tolist()
    for text in texts[::4]:
        text[:] = [text[0], 90, 91] * (len(text) // 3)
    return texts


def test_openings_are_cut_before_a_whole_word(data: PreparedData) -> None:
    prompts, endings = held_out_openings(data, 40, NUM_NEW)
    rows = [data.row(VALIDATION, row)[0].tolist() for row in range(data.num_rows(VALIDATION))]
    eos, half = data.tokenizer.eos_token_id, data.manifest.seq_len // 2
    assert len(prompts) == 40
    for prompt, ending in zip(prompts, endings, strict=True):
        assert half // 2 < len(prompt) <= half
        assert any(row[: len(prompt) + len(ending)] == [*prompt, *ending] for row in rows)
        assert len(ending) == NUM_NEW or ending[-1] == eos
        assert eos not in ending[:-1]
        text = data.tokenizer.decode(ending)
        assert text[0] == " "
        assert text[1].isalpha()
        assert ending[-1] == eos or not text[1:].isalpha()


def test_fewer_openings_are_the_first_of_more(data: PreparedData) -> None:
    few = held_out_openings(data, 5, NUM_NEW)
    prompts, endings = held_out_openings(data, 10**6, NUM_NEW)
    assert (prompts[:5], endings[:5]) == few
    assert 40 < len(prompts) <= data.num_rows(VALIDATION)


def test_padding_is_in_no_opening_and_no_ending(prepare_again: Callable[..., PreparedData]) -> None:
    data = prepare_again(seq_len=64, held_out_share=0.5, document_alignment=16)
    pad, (prompts, endings) = data.tokenizer.pad_token_id, held_out_openings(data, 10**6, 32)
    assert any(pad in data.row(VALIDATION, row)[0][:32] for row in range(data.num_rows(VALIDATION)))
    assert len(prompts) > 10
    assert not any(pad in text for text in (*prompts, *endings))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" the cat", "the"),
        (" The, cat", "the"),
        (" don't you", "don't"),
        (" cafés ", "cafés"),
        (" the<|endoftext|>", "the"),
        (" the's<|endoftext|>", "the's"),
        (" dogs'<|endoftext|>", "dogs"),
        (" the", None),
        (" don'", None),
        ("the cat", None),
        ("  the cat", None),
        (" 3 cats", None),
        ("\nthe cat", None),
        ("<|endoftext|>", None),
        (" ", None),
    ],
)
def test_the_first_word_begins_at_once_and_ends(
    data: PreparedData, text: str, word: str | None
) -> None:
    assert first_word(data.tokenizer.encode(text), data.tokenizer) == word


def test_a_word_that_ends_within_a_letter_is_not_whole(data: PreparedData) -> None:
    ids = data.tokenizer.encode(" cafés ")
    inside = [
        ids[:cut]
        for cut in range(len(ids))
        if data.tokenizer.decode(ids[:cut]).endswith("caf\ufffd")
    ]
    assert inside
    assert [first_word(part, data.tokenizer) for part in inside] == [None] * len(inside)


def test_real_text_has_the_figures_of_real_text(data: PreparedData) -> None:
    figures = compare(writes(real(data)), writes(real(data)), data, CONFIG)
    named = {
        name: estimate
        for name, estimate in figures.estimates.items()
        if f"held_out_{name}" in figures.estimates
    }
    assert len(named) * 2 + 1 == len(figures.estimates)
    assert all(
        figures.estimates[f"held_out_{name}"] == estimate for name, estimate in named.items()
    )
    assert dataclasses.astuple(figures.estimates["next_word_accuracy"]) == (1.0, 0.0, 40)
    assert (figures.num_openings, figures.num_new_tokens) == (40, NUM_NEW)


def test_figures_are_their_definitions(data: PreparedData) -> None:
    texts = wild(data)
    prompts, endings = held_out_openings(data, CONFIG.num_openings, NUM_NEW)
    eos, decode = data.tokenizer.eos_token_id, data.tokenizer.decode
    found = compare(writes(real(data)), writes(texts), data, CONFIG).estimates
    ended = [text if len(text) == NUM_NEW or text[-1] == eos else [*text, eos] for text in texts]

    rows = np.stack([data.row(TRAIN, row)[0] for row in range(data.num_rows(TRAIN))])
    judge = NgramJudge.train(
        rows, data.manifest.vocab_size, data.tokenizer.pad_token_id, CONFIG.judge_order
    )
    nats = [value for prompt, text in zip(prompts, ended) for value in judge.nats(prompt, text)]
    assert found["judge_nats_per_token"].value == pytest.approx(statistics.mean(nats))
    assert found["judge_nats_per_token"].count == len(nats)

    grams = [tuple(text[place : place + 4]) for text in ended for place in range(len(text) - 3)]
    assert found["distinct_4gram_share"].value == pytest.approx(len(set(grams)) / len(grams))
    repeated = 0
    for prompt, text in zip(prompts, ended):
        whole = [*prompt, *text]
        for place in range(len(prompt), len(whole) - 3):
            repeated += any(
                whole[earlier : earlier + 4] == whole[place : place + 4] for earlier in range(place)
            )
    assert found["repeated_4gram_share"].value == pytest.approx(repeated / len(grams))
    assert 0.05 < repeated / len(grams) < 1
    assert found["tokens_per_continuation"].value == pytest.approx(statistics.mean(map(len, ended)))

    entropies = [entropy([*Counter(text).values()]) for text in ended]
    assert found["continuation_entropy"].value == pytest.approx(statistics.mean(entropies))
    assert found["continuation_entropy"].count == len(ended)

    # A line break in each separator's place keeps the words on its sides apart.
    (line_break,) = data.tokenizer.encode("\n")
    rows[rows == eos] = line_break
    met = {word for row in rows.tolist() for word in words(decode(row))}
    read = [
        words(decode(text) + "\n" if text[-1] == eos else decode(text).rstrip("\ufffd'’"))
        for text in ended
    ]
    known = [word in met for some in read for word in some]
    assert found["known_word_share"].value == pytest.approx(statistics.mean(known))
    assert found["known_word_share"].count == len(known)
    assert 0.2 < statistics.mean(known) < 0.8

    # Another arrangement of the judge's training: a row each, filled up.
    encoded = [[*decode(row).encode()] for row in rows.tolist()]
    width = max(map(len, encoded))
    filled = np.array([[*row, *[256] * (width - len(row))] for row in encoded])
    byte_judge = NgramJudge.train(filled, 257, 256, 6)
    num_bytes, of_bytes, word_grams = 20, [], []
    for prompt, text in zip(prompts, ended):
        written = decode(text) + "\n" if text[-1] == eos else decode(text).rstrip("\ufffd'’")
        before = "\n".join(decode(part) for part in split(prompt, eos)).encode()
        of_bytes.extend(byte_judge.nats([*before], [*written.encode()[:num_bytes]]))
        some = words(written.encode()[:num_bytes].decode(errors="ignore"))
        word_grams += [tuple(some[place : place + 4]) for place in range(len(some) - 3)]
    short = dataclasses.replace(CONFIG, num_bytes=num_bytes)
    found_short = compare(writes(real(data)), writes(texts), data, short).estimates
    assert found_short["judge_nats_per_byte"].value == pytest.approx(statistics.mean(of_bytes))
    assert found_short["judge_nats_per_byte"].count == len(of_bytes)
    assert found_short["bytes_per_continuation"].value == pytest.approx(len(of_bytes) / 40)
    assert found_short["distinct_4word_share"].count == len(word_grams)
    assert found_short["distinct_4word_share"].value == pytest.approx(
        len(set(word_grams)) / len(word_grams)
    )

    def pairs(texts: list[list[int]], half: slice) -> Counter[tuple[int, int]]:
        whole = [[prompt[-1], *text] for prompt, text in zip(prompts[half], texts[half])]
        return Counter(
            (text[place], text[place + 1]) for text in whole for place in range(len(text) - 1)
        )

    def tokens(texts: list[list[int]], half: slice) -> Counter[int]:
        return Counter(token for text in texts[half] for token in text)

    for name, count in (("bigram_divergence", pairs), ("unigram_divergence", tokens)):
        one, two = slice(0, 20), slice(20, 40)
        expected = [
            divergence(count(ended, one), count(endings, two)),
            divergence(count(ended, two), count(endings, one)),
        ]
        assert found[name].value == pytest.approx(statistics.mean(expected))
        floor = divergence(count(endings, one), count(endings, two))
        assert found[f"held_out_{name}"].value == pytest.approx(floor)


def split(ids: list[int], end: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        if token == end:
            parts.append([])
        else:
            parts[-1].append(token)
    return parts


def divergence(p: Counter, q: Counter) -> float:
    total = 0.0
    for some in (p, q):
        for kind, uses in some.items():
            share, middle = uses / some.total(), (p[kind] / p.total() + q[kind] / q.total()) / 2
            total += share * math.log(share / middle) / 2
    return total


def test_words_that_only_a_separator_parts_are_two_words(
    prepare_again: Callable[..., PreparedData],
) -> None:
    generator = random.Random(6)
    documents = [
        " ".join(generator.choices(["we", "were", "her"], k=generator.randint(3, 20)))
        for _ in range(400)
    ]
    data = prepare_again("\n\n".join(documents), held_out_share=0.3, seq_len=64)
    joined = data.tokenizer.encode(" wewere werewe herwe werewere.")
    config = ComparisonConfig(num_openings=20, num_new_tokens=len(joined))
    found = compare(writes([joined] * 20), writes([joined] * 20), data, config).estimates
    assert (found["known_word_share"].value, found["known_word_share"].count) == (0.0, 4 * 20)
    assert found["held_out_known_word_share"].value == 1


def test_one_token_for_ever_is_found_out(data: PreparedData) -> None:
    token = data.tokenizer.encode("<|im_start|>")
    figures = compare(
        writes([token * NUM_NEW] * 40), writes([token * NUM_NEW] * 40), data, CONFIG
    ).estimates
    grams = NUM_NEW - 3
    assert figures["repeated_4gram_share"].value == pytest.approx((grams - 1) / grams)
    assert figures["distinct_4gram_share"].value == pytest.approx(1 / (40 * grams))
    assert figures["unigram_divergence"].value == pytest.approx(math.log(2))
    assert figures["bigram_divergence"].value == pytest.approx(math.log(2))
    assert figures["next_word_accuracy"].value == 0
    assert figures["continuation_entropy"].value == 0
    assert dataclasses.astuple(figures["known_word_share"]) == (0.0, 0.0, 0)
    assert figures["judge_nats_per_token"].value > math.log(data.manifest.vocab_size)


def test_the_standard_error_is_that_of_a_mean_over_openings(data: PreparedData) -> None:
    config = ComparisonConfig(num_openings=60, num_new_tokens=NUM_NEW)
    endings = held_out_openings(data, 60, NUM_NEW)[1]
    num_openings = len(endings)
    half_right = [text if place % 2 else text[::-1] for place, text in enumerate(endings)]
    cut = [text[: 1 + place % 7] for place, text in enumerate(endings)]
    figures = compare(writes(half_right), writes(cut), data, config).estimates
    accuracy, length = figures["next_word_accuracy"], figures["tokens_per_continuation"]
    expected = math.sqrt(accuracy.value * (1 - accuracy.value) / num_openings)
    assert 0.4 < accuracy.value < 0.6
    # 200 resamples know a standard deviation to 5 %.
    assert accuracy.standard_error == pytest.approx(expected, rel=0.2)
    lengths = [len(text) if data.tokenizer.eos_token_id in text else len(text) + 1 for text in cut]
    assert length.standard_error == pytest.approx(
        statistics.stdev(lengths) / math.sqrt(num_openings), rel=0.2
    )


def test_how_a_generator_ends_a_text_makes_no_difference(data: PreparedData) -> None:
    eos = data.tokenizer.eos_token_id
    short = [text[:4] for text in real(data)]
    ended = [[*text, eos] for text in short]
    longer = [[*text, 7, eos, 8] for text in ended]
    one, *others = (
        compare(writes(texts), writes(texts), data, CONFIG) for texts in (short, ended, longer)
    )
    assert others == [one, one]


def test_an_id_that_the_tokenizer_lacks_is_as_bad_as_padding(data: PreparedData) -> None:
    def with_token(token: int) -> list[list[int]]:
        return [[*text[:3], token, *text[4:]] for text in real(data)]

    size, pad = data.manifest.vocab_size, data.tokenizer.pad_token_id
    padded, beyond = (
        compare(writes(texts), writes(texts), data, CONFIG)
        for texts in map(with_token, (pad, size + 3))
    )
    assert padded == beyond
    assert (
        padded.estimates["judge_nats_per_token"].value
        > padded.estimates["held_out_judge_nats_per_token"].value
    )


def test_generators_get_the_openings_and_the_number_of_tokens(data: PreparedData) -> None:
    asked: list[tuple[Sequence[Sequence[int]], int]] = []

    def generator(prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        asked.append((prompts, num_new))
        return real(data)

    compare(generator, generator, data, CONFIG)
    assert asked == [(held_out_openings(data, 40, NUM_NEW)[0], NUM_NEW)] * 2
    for wrong in (real(data)[1:], [[*text, 5, 5] for text in real(data)]):
        with pytest.raises(AssertionError):
            compare(writes(wrong), writes(real(data)), data, CONFIG)


def test_a_large_training_split_teaches_the_judge_rows_from_all_over(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "_MOST_TRAINING_TOKENS", 10 * data.manifest.seq_len + 1)
    found = (
        compare(writes(real(data)), writes(real(data)), data, CONFIG)
        .estimates["judge_nats_per_token"]
        .value
    )
    num_rows = data.num_rows(TRAIN)
    rows = np.stack(
        [data.row(TRAIN, math.floor(share * num_rows))[0] for share in np.arange(10) / 10]
    )
    judge = NgramJudge.train(
        rows, data.manifest.vocab_size, data.tokenizer.pad_token_id, CONFIG.judge_order
    )
    prompts, endings = held_out_openings(data, 40, NUM_NEW)
    nats = [value for pair in zip(prompts, endings) for value in judge.nats(*pair)]
    assert found == pytest.approx(statistics.mean(nats))


def test_json_holds_figures_and_counts_alone(data: PreparedData) -> None:
    figures = compare(writes(wild(data)), writes(wild(data)), data, CONFIG)
    fields = json.loads(json.dumps(dataclasses.asdict(figures), allow_nan=False))
    estimates = fields.pop("estimates")
    assert fields == {"num_openings": 40, "num_new_tokens": NUM_NEW}
    assert set(estimates) == set(figures.estimates)
    for name, values in estimates.items():
        assert values == dict(
            zip(("value", "standard_error", "count"), dataclasses.astuple(figures.estimates[name]))
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_new_tokens": 17},
            "num_new_tokens must be at most half of a row of the data, 16 tokens",
        ),
        (
            {"num_openings": 3, "num_new_tokens": 8},
            "num_openings must be at least 4 for a standard error, not 3",
        ),
    ],
)
def test_settings_that_cannot_be_met_are_refused(
    data: PreparedData, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare(writes([]), writes([]), data, ComparisonConfig(**changes))


def test_data_without_held_out_rows_is_refused(prepare_again: Callable[..., PreparedData]) -> None:
    with pytest.raises(UserError, match="has 0 of 0 held-out rows"):
        compare(writes([]), writes([]), prepare_again(held_out_share=0.0, seq_len=32), CONFIG)

"""Generated corpora against grammars, parsers and counts that share no code with their judges."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.data import (
    CorpusConfig,
    GeneratedConfig,
    PrepareConfig,
    TokenizerTrainConfig,
)
from cola_train.config.settings import UserError
from cola_train.data.generated.corpus import LANGUAGES, document, documents
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.data.sources import read_documents, source_hashes
from cola_train.data.tokenizer_training import train_tokenizer

KINDS = tuple(LANGUAGES)
SIZES = {"dyck": (2, 63), "copy": (3, 30), "json": (49, 63), "arithmetic": (6, 63)}


def made(kind: str, **settings: Any) -> GeneratedConfig:
    return GeneratedConfig(kind=kind, **settings)  # type: ignore[arg-type]


def in_language(kind: str, text: str) -> bool:
    return LANGUAGES[kind].fault(text) is None


# The languages.


def dyck_words(num_pairs: int) -> set[str]:
    """By the grammar: a word is nothing, or (word)word or [word]word."""
    if num_pairs == 0:
        return {""}
    return {
        f"{pair[0]}{inner}{pair[1]}{rest}"
        for inside in range(num_pairs)
        for inner in dyck_words(inside)
        for rest in dyck_words(num_pairs - 1 - inside)
        for pair in ("()", "[]")
    }


def test_dyck_is_what_its_grammar_makes_up_to_8_characters() -> None:
    grammar = set().union(*(dyck_words(pairs) for pairs in range(1, 5)))
    assert len(grammar) == 2 + 2 * 4 + 5 * 8 + 14 * 16  # Catalan numbers, times kinds
    for length in range(9):
        for characters in product("()[]", repeat=length):
            text = "".join(characters)
            assert in_language("dyck", text) == (text in grammar)


def test_dyck_words_of_a_length_are_equally_likely() -> None:
    config = made("dyck", most_bytes=6, num_documents=12_000)
    found = Counter(documents(config))
    assert found.keys() == dyck_words(1) | dyck_words(2) | dyck_words(3)
    for pairs in (1, 2, 3):
        words = dyck_words(pairs)
        counts = [found[word] for word in words]
        expected = 4000 / len(words)
        # Chi-square: its mean is the degrees of freedom, its variance twice that.
        chi_square = sum((count - expected) ** 2 / expected for count in counts)
        freedom = len(words) - 1
        assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_copies_are_what_a_back_reference_matches_up_to_7_characters() -> None:
    form = re.compile(r"([a-z]+)\|\1")
    for length in range(8):
        for characters in product("az|", repeat=length):
            text = "".join(characters)
            assert in_language("copy", text) == bool(form.fullmatch(text))
    for text in ("A|A", "é|é", "a|a\n", "a |a ", "a|a|a", "a|a|"):
        assert not in_language("copy", text)


@given(st.integers(0, 10**30), st.integers(0, 10**30), st.integers(0, 10**31))
def test_sums_are_pythons(one: int, other: int, wrong: int) -> None:
    assert in_language("arithmetic", f"{one}+{other}={one + other}")
    assert in_language("arithmetic", f"{one}+{other}={wrong}") == (wrong == one + other)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1+1",
        "1+1=",
        "1+1=02",
        "01+1=2",
        "1+1=2 ",
        "1 +1=2",
        "-1+2=1",
        "1+1=2\n",
        "+1=1",
        "1+²=3",
    ],
)
def test_sums_are_written_in_one_way(text: str) -> None:
    assert not in_language("arithmetic", text)
    assert in_language("arithmetic", f"{'9' * 9000}+1=1{'0' * 9000}")


@given(
    st.text("abcd", max_size=8),
    st.integers(-1, 9),
    st.lists(st.sampled_from(["red", "blue", "pink"]), max_size=5),
    st.integers(-1, 6),
)
def test_records_are_those_that_pythons_json_reads_and_that_count_right(
    name: str, letters: int, tags: list[str], count: int
) -> None:
    record = {"name": name, "letters": letters, "tags": tags, "count": count}
    is_right = (
        1 <= len(name) <= 6
        and letters == len(name)
        and "pink" not in tags
        and count == len(tags) <= 3
    )
    assert in_language("json", json.dumps(record, separators=(",", ":"))) == is_right
    assert not in_language("json", json.dumps(record))  # with blanks


@given(st.data())
def test_no_cut_of_a_record_is_one(data: st.DataObject) -> None:
    text = document(made("json"), data.draw(st.integers(0, 1000)))
    cut = data.draw(st.integers(0, len(text) - 1))
    assert not in_language("json", text[:cut])
    assert not in_language("json", text[:cut] + text[cut + 1 :]) or text[cut] == text[cut - 1]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("[1]", "has other keys, or in another order"),
        ('{"name":"ab","letters":2,"tags":[],"count":false}', "counts its tags wrong"),
        ('{"name":"a","letters":true,"tags":[],"count":0}', "counts its letters wrong"),
        ('{"name":"a","letters":1.0,"tags":[],"count":0}', "counts its letters wrong"),
        ('{"name":"a","letters":1,"tags":[[]],"count":1}', "has other tags"),
        ('{"name":"\\u0061","letters":1,"tags":[],"count":0}', "has blanks or escapes"),
        ('{"name":"b","name":"a","letters":1,"tags":[],"count":0}', "has blanks or escapes"),
        ('{"name":"A","letters":1,"tags":[],"count":0}', "has another name than 1 to 6 letters"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_wrong_with_a_record(text: str, fault: str) -> None:
    assert LANGUAGES["json"].fault(text) == fault


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_any_text_is_judged_without_an_error(kind: str, data: st.DataObject) -> None:
    text = data.draw(st.text() | st.text('()[]{}|+=0123456789ab",:'))
    fault = LANGUAGES[kind].fault(text)
    assert fault is None or fault


# The corpora.


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_in_their_language_and_no_longer_than_asked(kind: str) -> None:
    for most_bytes in SIZES[kind]:
        config = made(kind, most_bytes=most_bytes, num_documents=2000)
        texts = [*documents(config)]
        assert all(in_language(kind, text) for text in texts)
        assert max(len(text.encode()) for text in texts) in range(most_bytes - 2, most_bytes + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_depends_on_its_number_and_the_seed_alone(kind: str) -> None:
    few, many = made(kind, num_documents=5), made(kind, num_documents=50)
    texts = [*documents(many)]
    assert [*documents(few)] == texts[:5]
    assert document(few, 40) == texts[40]
    assert [*documents(made(kind, num_documents=50, seed=1))] != texts


def test_documents_stay_what_they_are() -> None:
    """Another machine and version of Python writes the same, and so must the next of ours."""
    assert [document(made(kind), 7) for kind in KINDS] == [
        "([][][()])([])()[(())([[]])[[(())]]]()",
        "csuzyjdclwwbxicjzwbwvxappuz|csuzyjdclwwbxicjzwbwvxappuz",
        '{"name":"zkhol","letters":5,"tags":["green"],"count":1}',
        "379481536490+4381897482084447927=4381897861565984417",
    ]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "dyck", "num_documents": 0}, "num_documents must be at least 1, not 0"),
        ({"kind": "dyck", "most_bytes": 1}, "most_bytes must be at least 2 bytes, not 1"),
        (
            {"kind": "json", "most_bytes": 48},
            "most_bytes must be at least 49 for kind=json, not 48",
        ),
        ({"kind": "arithmetic", "most_bytes": 5}, "at least 6 for kind=arithmetic, not 5"),
        ({"kind": "copy", "most_bytes": 2}, "at least 3 for kind=copy, not 2"),
        ({"kind": "copy", "seed": -1}, r"seed must be in \[0, 2\^63\), not -1"),
    ],
)
def test_what_a_corpus_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GeneratedConfig(**settings)


@pytest.mark.parametrize("others", [{"inputs": ["a"]}, {"dataset": "b"}])
def test_generated_text_is_not_mixed_with_other_text(others: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"exactly one of .*corpus\.generated\.kind \(got 'copy'\)"):
        TokenizerTrainConfig(out="o", corpus=CorpusConfig(generated=made("copy"), **others))


# Prepared.


def prepare_made(folder: Path, generated: GeneratedConfig) -> PreparedData:
    corpus = CorpusConfig(generated=generated)
    tokenizer = str(folder / "tokenizer.json")
    train_tokenizer(TokenizerTrainConfig(out=tokenizer, corpus=corpus, vocab_size=260))
    return rows_of(folder, generated)


def rows_of(folder: Path, generated: GeneratedConfig) -> PreparedData:
    """Prepared by the tokenizer that is there."""
    return prepare(
        PrepareConfig(
            out=str(folder / "rows"),
            tokenizer=str(folder / "tokenizer.json"),
            corpus=CorpusConfig(generated=generated),
            seq_len=64,
            document_alignment=64,
            held_out_share=0.2,
        )
    )


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_rows_hold_a_document_each_and_held_out_ones_apart(
    kind: str, tmp_path: Path
) -> None:
    config = made(kind, num_documents=300)
    data = prepare_made(tmp_path, config)
    by_split = {}
    for split, counts in data.manifest.splits.items():
        assert counts.num_rows == counts.num_documents
        rows = (data.row(split, number)[0].tolist() for number in range(counts.num_rows))
        by_split[split] = [data.tokenizer.decode(row) for row in rows]
        assert all(in_language(kind, text) for text in by_split[split])
    assert sorted([*by_split["train"], *by_split["validation"]]) == sorted(documents(config))
    assert not {*by_split["train"]} & {*by_split["validation"]}
    assert GeneratedConfig(**(data.manifest.generated or {})) == config
    assert [(s.name, s.kind) for s in data.manifest.sources] == [(kind, "generated")]


def test_another_corpus_is_not_taken_for_the_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made("copy", num_documents=300)
    data = prepare_made(tmp_path, config)
    assert prepare_made(tmp_path, config).manifest == data.manifest
    assert "Already prepared, nothing to do" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"generated is \{.*'seed': 0\} there, .*'seed': 1\} here"):
        rows_of(tmp_path, made("copy", num_documents=300, seed=1))


def test_a_source_is_known_by_its_documents() -> None:
    config = made("dyck", num_documents=20)
    (source,) = source_hashes(CorpusConfig(generated=config))
    (other,) = source_hashes(CorpusConfig(generated=made("dyck", num_documents=21)))
    assert source.sha256 != other.sha256
    assert [*read_documents(CorpusConfig(generated=config))] == [*documents(config)]

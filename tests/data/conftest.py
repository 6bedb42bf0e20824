"""Fixtures of the data tests: a few thousand words of real prose, a tokenizer learnt from them,
small prepared folders.
"""

import dataclasses
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cola_train
from cola_train.config.data import CorpusConfig, PrepareConfig, TokenizerTrainConfig
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.data.tokenizer_training import train_tokenizer

AUSTEN = Path(cola_train.__file__).parent / "data" / "austen.txt.xz"


@pytest.fixture(scope="session")
def prose() -> str:
    """About 200 kB: the first paragraphs of the packaged text."""
    with lzma.open(AUSTEN, "rt", encoding="utf-8") as file:
        return file.read(200_000).rsplit("\n\n", 1)[0]


@pytest.fixture(scope="session")
def prose_file(prose: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(prose, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_file(prose_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(
        TokenizerTrainConfig(
            out=str(path), corpus=CorpusConfig(inputs=[str(prose_file)]), vocab_size=600
        )
    )
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


@pytest.fixture
def prepare_config(
    prose_file: Path, tokenizer_file: Path, tmp_path: Path
) -> Callable[..., PrepareConfig]:
    """A small preparation, any setting replaced; `inputs` replaces the corpus' files."""

    def build(*, inputs: list[Any] | None = None, **changes: Any) -> PrepareConfig:
        corpus = CorpusConfig(inputs=[str(path) for path in inputs or [prose_file]])
        config = PrepareConfig(
            out=str(tmp_path / "prepared"),
            tokenizer=str(tokenizer_file),
            seq_len=64,
            corpus=corpus,
            held_out_share=0.1,
        )
        return dataclasses.replace(config, **changes)

    return build


@pytest.fixture(scope="session")
def prepared(
    prose_file: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> PreparedData:
    """Shared by tests that only read."""
    return prepare(
        PrepareConfig(
            out=str(tmp_path_factory.mktemp("prepared") / "data"),
            tokenizer=str(tokenizer_file),
            seq_len=64,
            corpus=CorpusConfig(inputs=[str(prose_file)]),
            held_out_share=0.1,
            document_alignment=4,
        )
    )

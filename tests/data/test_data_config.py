"""What the settings of the data verbs refuse."""

from typing import Any

import pytest

from cola_train.config.data import CorpusConfig, PrepareConfig, TokenizerTrainConfig
from cola_train.config.load import load_config
from cola_train.config.settings import UserError

TEXT = CorpusConfig(inputs=["a.txt"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"corpus": CorpusConfig()},
            (
                r"Give exactly one of corpus\.inputs \(got \[\]\) and corpus\.dataset \(got "
                r"None\), for example"
            ),
        ),
        (
            {"corpus": CorpusConfig(inputs=["a"], dataset="b")},
            r"Give exactly one of corpus\.inputs \(got \['a'\]\) and .*\(got 'b'\)",
        ),
        ({"seq_len": 0}, "seq_len must be at least 1 token, not 0"),
        ({"held_out_share": 1.0}, r"held_out_share must be in \[0, 1\), not 1\.0"),
        ({"held_out_share": -0.1}, r"held_out_share must be in \[0, 1\), not -0\.1"),
        ({"num_processes": 0}, "num_processes must be at least 1, not 0"),
        (
            {"document_alignment": 3},
            r"document_alignment must divide seq_len \(512\), not 3",
        ),
        (
            {"document_alignment": 0},
            r"document_alignment must be at least 1, not 0",
        ),
    ],
)
def test_prepare_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrepareConfig(**{"out": "o", "tokenizer": "t", "corpus": TEXT, **changes})


def test_a_document_has_room_for_a_byte() -> None:
    with pytest.raises(UserError, match="max_document_bytes must be at least 1 byte, not 0"):
        CorpusConfig(inputs=["a"], max_document_bytes=0)


def test_tokenizer_settings() -> None:
    with pytest.raises(
        UserError,
        match=r"vocab_size must be at least 260 \(256 bytes and 4 special tokens\), not 259",
    ):
        TokenizerTrainConfig(out="o", corpus=TEXT, vocab_size=259)
    with pytest.raises(UserError, match="Give exactly one of"):
        TokenizerTrainConfig(out="o")


def test_settings_come_from_the_command_line() -> None:
    config = load_config(
        PrepareConfig,
        overrides=[
            "out=o",
            "tokenizer=t",
            "corpus.dataset=allenai/c4",
            "corpus.dataset_config=en",
            "corpus.documents=file",
        ],
    )
    assert config.corpus == CorpusConfig(
        dataset="allenai/c4", dataset_config="en", documents="file"
    )
    with pytest.raises(UserError, match=r"corpus\.documents"):
        load_config(
            PrepareConfig,
            overrides=["out=o", "tokenizer=t", "corpus.inputs=[a]", "corpus.documents=line"],
        )

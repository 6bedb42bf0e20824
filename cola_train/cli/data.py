"""Verbs from text to rows: tokenizer, prepare."""

import argparse
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_verb, load_settings
from cola_train.config.data import PrepareConfig, TokenizerTrainConfig


def add(verbs: Any) -> None:
    """Add these verbs."""
    tokenizer = verbs.add_parser("tokenizer", help="make a tokenizer.json: train it, or OLMo 2's")
    kinds = tokenizer.add_subparsers(title="kinds", metavar="KIND", required=True)
    add_verb(
        kinds,
        "train",
        _tokenizer_train,
        "train a byte-level BPE on text",
        TokenizerTrainConfig,
        example="out=data/tokenizer.json 'corpus.inputs=[my_texts]' vocab_size=4096",
    )
    olmo2 = kinds.add_parser(
        "olmo2", help="build the OLMo 2 tokenizer of the paper (needs the extra 'olmo2')"
    )
    olmo2.add_argument("out", type=Path, help="the tokenizer.json to write")
    olmo2.set_defaults(run=_tokenizer_olmo2)

    add_verb(
        verbs,
        "prepare",
        _prepare,
        "tokenize text into memory-mapped rows",
        PrepareConfig,
        example="out=data/austen tokenizer=data/tokenizer.json 'corpus.inputs=[my_texts]'",
    )


def _tokenizer_train(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.data.tokenizer import train_tokenizer

    train_tokenizer(config)


def _tokenizer_olmo2(options: argparse.Namespace) -> None:
    from cola_train.data.olmo2 import build_olmo2_tokenizer

    build_olmo2_tokenizer(options.out)


def _prepare(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.data.prepare import prepare

    prepare(config)

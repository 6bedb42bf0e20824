"""The files that are changed: a corpus, rows, runs of three families, lists of samples."""

import contextlib
import io
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import yaml

from cola_train.cli import main
from tests.helpers.runs import BOOK, SMALL, SMALL_DIT, SMALL_TRANSFORMER

_NOT_SMALL = ("trainer.max_steps", "checkpoint.every_steps", "trainer.validate_every_steps")
_LINES = {
    "prompts.jsonl": [
        {"prompt": "It is a truth", "id": 7},
        {"prompt": "My dear Mr. Bennet"},
        {"input_ids": [5, 6, 7]},
    ],
    "texts.jsonl": [
        {"text": "It is a truth universally acknowledged"},
        {"prompt": "My dear", "continuation": " Mr. Bennet"},
    ],
    "bench/obqa.jsonl": [
        {"id": "a", "question": "Who?", "ground_truth": "Darcy", "choices": ["Jane", "Darcy"]},
        {"id": 2, "question": "Where?", "ground_truth": "here", "choices": ["here", "there"]},
    ],
    "obqa.jsonl": [{"id": "a", "generation": "(B)"}, {"id": 2, "generation": "there"}],
    "answers.jsonl": [
        {"task": "obqa", "id": 1, "generation": "(A)", "ground_truth": "x", "choices": ["x", "y"]},
        {"task": "lambada", "id": 2, "generation": "Darcy", "ground_truth": "Darcy"},
        {"task": "squad", "id": "c", "generation": "a house", "ground_truth": "the house"},
    ],
}


def make_base() -> None:
    """Everything that is asked for below, made by the program's verbs in the current folder."""
    Path("bench").mkdir()
    for name, lines in _LINES.items():
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = lzma.decompress(BOOK.read_bytes())[:1800].rsplit(b"\n", 1)[0].decode()
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    Path("book.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    corpus = "corpus.inputs=[book.jsonl]"
    _run("tokenizer", "train", "out=tokenizer.json", corpus, "vocab_size=320")
    rows = {"seq_len": 16, "held_out_share": 0.3, "corpus": {"inputs": ["book.jsonl"]}}
    given = {"out": "rows", "tokenizer": "tokenizer.json", **rows}
    Path("prepare.yaml").write_text(yaml.safe_dump(given))
    _run("prepare", "prepare.yaml")
    Path("sampler.yaml").write_text("max_new_tokens: 6\nseed: 3\ntemperature: 0.7\nsolver: euler\n")
    shared = [
        *(one for one in SMALL if one.partition("=")[0] not in _NOT_SMALL),
        *("data.path=rows", "data.seq_len=16", "runs_folder=runs", "trainer.max_steps=2"),
        *("checkpoint.every_steps=1", "trainer.validate_every_steps=0"),
    ]
    plain = [one for one in shared if not one.startswith("vae.")]
    _as_yaml("vae.yaml", "name=new", *shared, "trainer.max_steps=1")
    _as_yaml("ar.yaml", "name=new", *plain, *SMALL_TRANSFORMER)
    _as_yaml(
        "joint.yaml", "name=new", "init_vae_from=runs/v/hf", *shared, *SMALL_DIT,
        "trainer.max_steps=1",
    )  # fmt: skip
    _run("vae", *shared, "name=v")
    _run("joint", "joint.yaml", "name=j")
    _run("ar", *plain, *SMALL_TRANSFORMER, "name=a")


def _run(*arguments: str) -> None:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = main(arguments)
    if status != 0:
        sys.exit(f"{' '.join(arguments)}: {status}: {err.getvalue()}")


def _as_yaml(name: str, *settings: str) -> None:
    values: dict[str, Any] = {}
    for text in settings:
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = yaml.safe_load(value)
    Path(name).write_text(yaml.safe_dump(values))

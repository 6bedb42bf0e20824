"""What is changed, what is then asked of the program, and what its result is."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.mutations.changes import BYTES, HOSTILE, Change
from tests.mutations.readings import (
    Asked,
    contents,
    digest,
    flat,
    json_rows,
    rows_of,
    settings_in,
    weights,
    yaml_settings,
)
from tests.mutations.structure import JSON, SAFETENSORS, YAML

_STEP = "lightning/step-00000002"


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A file of a kind, the changes that it undergoes, and a command that reads it.

    Attributes:
        kind: of the table.
        files: by name; a change is of one of them.
        needs: what is copied for the command, beside the files.
        arguments: of the command.
        result: read after it; with what was printed it has to be what it was without a change.
        asked: where another file may ask for another result.
        without: files that are taken away first.
        prints: whether what is printed belongs to the result.
    """

    kind: str
    files: tuple[str, ...]
    arguments: tuple[str, ...]
    result: Callable[[], Any]
    changes: Mapping[str, Change]
    needs: tuple[str, ...] = ()
    asked: Asked | None = None
    without: tuple[str, ...] = ()
    prints: bool = True

    @property
    def name(self) -> str:
        """For people."""
        verbs = " ".join(self.arguments[:2])
        return f"{self.kind}, {Path(self.files[0]).name}: {verbs}"


_SAMPLE = ("--prompt", "It is a truth", "max_new_tokens=6", "seed=1")
_PLAIN = {**BYTES, **HOSTILE}
_ANY_JSON = {**_PLAIN, **JSON}
_ANY_YAML = {**_PLAIN, **YAML}
_TENSORS = {**_PLAIN, **SAFETENSORS}
_STRUCTURE = {**HOSTILE, **JSON}


def _nothing() -> None:
    return None


def _text_of(path: str) -> Callable[[], str]:
    return lambda: Path(path).read_text()


def _exports() -> list[Subject]:
    vae, dit = "runs/j/hf/cola_dlm/cola_vae", "runs/j/hf/cola_dlm/cola_dit"
    sample_j, sample_a = ("sample", "runs/j/hf", *_SAMPLE), ("sample", "runs/a/hf", *_SAMPLE)
    rows = ("likelihood", "runs/a/hf", "--data", "rows")
    found = []
    for command, folders in ((sample_j, (vae, dit)), (sample_a, ("runs/a/hf",))):
        run = command[1]
        for folder in folders:
            for name, changes in (
                ("model.safetensors", _TENSORS),
                ("config.json", _ANY_JSON),
                ("checksums.json", _ANY_JSON),
            ):
                files = (f"{folder}/{name}",)
                found.append(Subject("export", files, command, _nothing, changes, (run,)))
        for name in ("tokenizer.json", "training.json"):
            files = (f"{run}/{name}",)
            found.append(Subject("export", files, command, _nothing, _ANY_JSON, (run,)))
    found += [
        Subject("export", (f"runs/a/hf/{name}",), rows, _nothing, _ANY_JSON, ("runs/a/hf", "rows"))
        for name in ("training.json", "config.json")
    ]
    # As others write them: without checksums. What can be seen without is refused.
    for folder, command in ((vae, sample_j), (dit, sample_j), ("runs/a/hf", sample_a)):
        root = command[1]
        sums = tuple(
            f"{place}/checksums.json"
            for place in {folder, root, *((vae, dit) if root in vae else ())}
        )
        for name, changes in (("model.safetensors", SAFETENSORS), ("config.json", _STRUCTURE)):
            files = (f"{folder}/{name}",)
            found.append(
                Subject("foreign export", files, command, _nothing, changes, (root,), without=sums)
            )
    begin = ("joint", "joint.yaml", "name=k")
    needs = ("joint.yaml", "runs/v/hf", "rows")
    found += [
        Subject(
            "export", (f"runs/v/hf/{name}",), begin, weights("k", 1), changes, needs, prints=False
        )
        for name, changes in (
            ("cola_dlm/cola_vae/model.safetensors", _TENSORS),
            ("cola_dlm/cola_vae/config.json", _ANY_JSON),
            ("tokenizer.json", _ANY_JSON),
        )
    ]
    return found


def _rows() -> list[Subject]:
    train, needs = ("ar", "ar.yaml"), ("ar.yaml", "rows")
    rows = ("likelihood", "runs/a/hf", "--data", "rows")
    result = weights("new", 2)
    found = [
        Subject("rows", (f"rows/{name}",), train, result, changes, needs, prints=False)
        for name, changes in (
            ("train.tokens.bin", _PLAIN),
            ("train.documents.bin", _PLAIN),
            ("manifest.json", _ANY_JSON),
            ("tokenizer.json", _ANY_JSON),
        )
    ]
    found += [
        Subject("rows", (f"rows/{name}",), rows, _nothing, changes, ("rows", "runs/a/hf"))
        for name, changes in (
            ("validation.tokens.bin", _PLAIN),
            ("validation.documents.bin", _PLAIN),
            ("manifest.json", _ANY_JSON),
        )
    ]
    again = ("prepare", "prepare.yaml")
    files = ("rows/manifest.json",)
    needs = ("prepare.yaml", "tokenizer.json", "book.jsonl", "rows")
    return [*found, Subject("rows", files, again, _nothing, _ANY_JSON, needs)]


def _runs() -> list[Subject]:
    resume = ("ar", "--resume", "runs/a", "trainer.max_steps=3")
    export = ("export", "runs/a", "--out", "exported")
    files = {
        "config.yaml": _ANY_YAML,
        "status.json": _ANY_JSON,
        "metrics.jsonl": _ANY_JSON,
        "steps.jsonl": _ANY_JSON,
        "summary.json": _ANY_JSON,
        "tokenizer.json": _ANY_JSON,
        "losses.png": _PLAIN,
        ".lock": HOSTILE,
        "lightning/latest": _PLAIN,
        f"{_STEP}/manifest.json": _ANY_JSON,
        f"{_STEP}/shard-00001-model-00001-of-00001.safetensors": _TENSORS,
    }
    found, result = [], weights("a", 3)
    for name, changes in files.items():
        place, needs = (f"runs/a/{name}",), ("runs/a", "rows")
        found.append(Subject("run", place, resume, result, changes, needs, prints=False))
        if name in ("config.yaml", "tokenizer.json") or name.startswith("lightning"):
            whole = lambda: contents("exported")  # noqa: E731
            found.append(Subject("run", place, export, whole, changes, needs))
    found += [
        Subject(
            "run", (f"runs/a/{name}",), command, _nothing, changes, ("runs/a", "rows"), prints=False
        )
        for name, changes, command in (
            ("status.json", _ANY_JSON, ("runs", "runs", "--json")),
            ("status.json", _ANY_JSON, ("runs", "runs")),
            ("metrics.jsonl", _ANY_JSON, ("runs", "runs")),
            ("config.yaml", _ANY_YAML, ("runs", "runs")),
            (".lock", HOSTILE, ("runs", "runs")),
            ("steps.jsonl", _ANY_JSON, ("audit", "runs/a")),
            ("config.yaml", _ANY_YAML, ("audit", "runs/a")),
        )
    ]
    start = ("warm-start", "runs/a", "ar.yaml", "name=w", "trainer.max_steps=1")
    branch = ("branch", "runs/a", "name=b", "--step", "1", "trainer.max_steps=2")
    for name, changes in (("config.yaml", _ANY_YAML), ("lightning/latest", _PLAIN)):
        place, needs = (f"runs/a/{name}",), ("runs/a", "rows", "ar.yaml")
        found.append(Subject("run", place, start, weights("w", 1), changes, needs, prints=False))
    for name, changes in (
        ("config.yaml", _ANY_YAML),
        ("metrics.jsonl", _ANY_JSON),
        ("tokenizer.json", _ANY_JSON),
    ):
        place, needs = (f"runs/a/{name}",), ("runs/a", "rows")
        found.append(Subject("run", place, branch, weights("b", 2), changes, needs, prints=False))
    return found


def _inputs() -> list[Subject]:
    """Files that a user writes: another one may ask for something else."""
    prompts, texts = ("prompt", "input_ids"), ("text", "prompt", "continuation")

    def fields(names: tuple[str, ...]) -> Callable[[str], Any]:
        return lambda text: [
            {name: row[name] for name in names if name in row} for row in json_rows(text)
        ]

    out = ("--out", "out.jsonl")
    wanted = ("id", "ground_truth", "choices")
    return [
        Subject(
            "config", ("vae.yaml",), ("vae", "vae.yaml", "name=new"), weights("new", 1),
            _ANY_YAML, ("rows",), Asked(yaml_settings, settings_in("runs/new/config.yaml")),
            prints=False,
        ),
        Subject(
            "config", ("sampler.yaml",),
            ("sample", "runs/a/hf", "sampler.yaml", *_SAMPLE[:2], *out),
            _text_of("out.jsonl"), _ANY_YAML, ("runs/a/hf",),
            Asked(
                yaml_settings,
                lambda: flat(json.loads(Path("out.jsonl.settings.json").read_text())["sampler"]),
            ),
        ),
        Subject(
            "config", ("prepare.yaml",), ("prepare", "prepare.yaml", "out=rows2"),
            lambda: contents("rows2"), _ANY_YAML, ("tokenizer.json", "book.jsonl"),
            Asked(yaml_settings, _nothing),
        ),
        Subject(
            "tokenizer", ("tokenizer.json",), ("prepare", "prepare.yaml", "out=rows2"),
            lambda: contents("rows2"), _ANY_JSON, ("prepare.yaml", "book.jsonl"),
            Asked(
                lambda text: hashlib.sha256(Path("tokenizer.json").read_bytes()).hexdigest(),
                lambda: json.loads(Path("rows2/manifest.json").read_text())["tokenizer_sha256"],
            ),
        ),
        Subject(
            "samples", ("book.jsonl",), ("prepare", "prepare.yaml", "out=rows2"),
            lambda: contents("rows2"), _ANY_JSON, ("prepare.yaml", "tokenizer.json"),
            Asked(
                lambda text: [digest("book.jsonl")],
                lambda: [
                    source["sha256"]
                    for source in json.loads(Path("rows2/manifest.json").read_text())["sources"]
                ],
            ),
        ),
        Subject(
            "samples", ("prompts.jsonl",),
            ("sample", "runs/a/hf", "--prompts", "prompts.jsonl", *out, "max_new_tokens=6"),
            _text_of("out.jsonl"), _ANY_JSON, ("runs/a/hf",),
            Asked(fields(prompts), lambda: fields(prompts)(Path("out.jsonl").read_text())),
        ),
        Subject(
            "samples", ("texts.jsonl",),
            ("likelihood", "runs/a/hf", "--texts", "texts.jsonl", *out),
            _text_of("out.jsonl"), _ANY_JSON, ("runs/a/hf",),
            Asked(fields(texts), lambda: fields(texts)(Path("out.jsonl").read_text())),
        ),
        Subject(
            "samples", ("bench/obqa.jsonl",),
            ("evaluate", "runs/a/hf", "--data", "bench", "--tasks", "obqa", "--out", "answers",
             "sampler.max_new_tokens=6"),
            lambda: rows_of("answers/answers.jsonl"), _ANY_JSON, ("runs/a/hf",),
            Asked(fields(wanted), lambda: [
                {name: row[name] for name in wanted} for row in rows_of("answers/answers.jsonl")
            ]),
        ),
        Subject(
            "samples", ("answers.jsonl",), ("score", "answers.jsonl", "--out", "scored"),
            lambda: rows_of("scored/verdicts.jsonl"), _ANY_JSON, (),
            Asked(lambda text: json_rows(text, skips=True), _nothing),
        ),
        Subject(
            "samples", ("bench/obqa.jsonl",), ("score", "obqa.jsonl", "--data", "bench"),
            _nothing, _ANY_JSON, ("obqa.jsonl",), Asked(fields(wanted), _nothing),
        ),
    ]  # fmt: skip


SUBJECTS: tuple[Subject, ...] = (*_exports(), *_rows(), *_runs(), *_inputs())

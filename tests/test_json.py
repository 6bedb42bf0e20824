"""JSON from elsewhere, nested without end: every reader names the file, or passes over it."""

import ast
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import cola_train
from cola_train.config.data import CorpusConfig
from cola_train.config.settings import UserError
from cola_train.data.prepared import PreparedData
from cola_train.data.sources import read_documents
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.benchmarks.answers import AnswerFolder
from cola_train.evaluation.benchmarks.score import read_answers
from cola_train.evaluation.benchmarks.tasks import read_samples
from cola_train.evaluation.writing.sample import read_prompts
from cola_train.export_files import read_json
from cola_train.families.registry import load_checkpoint
from cola_train.json_lines import read_log
from cola_train.json_text import parse_json
from cola_train.run_folder import read_status
from cola_train.tensor_files import read_tensors
from cola_train.training.checkpoints.folder import read_manifest
from cola_train.training.loop.step_log import read_step_log

DEEP = "[" * 100_000 + "]" * 100_000


def nested(depth: int, kind: str) -> str:
    opening, closing = {"list": ("[", "]"), "object": ('{"a": ', "}")}[kind]
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize("kind", ["list", "object"])
def test_depth_is_limited_before_python_is(kind: str) -> None:
    assert parse_json(nested(200, kind)) == json.loads(nested(200, kind))
    assert parse_json(json.dumps(["[{" * 1000])) == ["[{" * 1000], "brackets in a text"
    assert parse_json("[" + "[1]," * 1000 + "[]]") == [[1]] * 1000 + [[]]
    for depth in (201, 900, 3000, 100_000):
        with pytest.raises(ValueError, match="nested more than 200 deep"):
            parse_json(nested(depth, kind))


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a field of a checkpoint": ("training.json", lambda path: read_json(path)),
    "a checkpoint's config": ("config.json", lambda path: load_checkpoint(path.parent)),
    "an index of weights": (
        "model.safetensors.index.json",
        lambda path: read_tensors({}, path.parent),
    ),
    "a tokenizer": ("tokenizer.json", Tokenizer.load),
    "prepared rows": ("manifest.json", lambda path: PreparedData.open(path.parent)),
    "a run's checkpoint": ("manifest.json", lambda path: read_manifest(path.parent)),
    "a folder of answers": (
        "evaluation.json",
        lambda path: AnswerFolder.open(path.parent, {"data": {}}),
    ),
    "a corpus": (
        "corpus.jsonl",
        lambda path: [*read_documents(CorpusConfig(inputs=[str(path)]))],
    ),
    "prompts": ("prompts.jsonl", read_prompts),
    "samples of a benchmark": ("lambada.jsonl", lambda path: read_samples(path.parent, "lambada")),
    "answers": ("lambada.jsonl", read_answers),
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_nested_without_end_is_refused_by_name(name: str, tmp_path: Path) -> None:
    file, read = READERS[name]
    (tmp_path / file).write_text(DEEP)
    with pytest.raises(UserError, match=str(tmp_path)):
        read(tmp_path / file)


def test_a_header_of_weights_nested_without_end_is_refused_by_name(tmp_path: Path) -> None:
    header = f'{{"a": {DEEP}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt or truncated"):
        read_tensors({}, tmp_path)


def test_logs_are_read_past_it(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(f'{DEEP}\n{{"a": 1}}\n')
    (tmp_path / "steps.jsonl").write_text(f"{DEEP}\n")
    (tmp_path / "status.json").write_text(DEEP)
    assert [*read_log(tmp_path / "log.jsonl")] == [{"a": 1}]
    assert [*read_step_log(tmp_path)] == []
    assert read_status(tmp_path) is None


def test_all_json_is_read_by_one_function() -> None:
    package = Path(cola_train.__file__).parent
    assert [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.load", "json.loads")
    ] == ["json_text.py"]

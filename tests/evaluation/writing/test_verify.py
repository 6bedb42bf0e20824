"""How many texts are valid: by writers whose share is known, and by tiny trained models."""

import dataclasses
import json
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import binomtest

from cola_train.config.data import (
    CorpusConfig,
    GeneratedConfig,
    PrepareConfig,
    TokenizerTrainConfig,
)
from cola_train.config.load import load_config
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.batch import validation_batches
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.data.tokenizer_training import train_tokenizer
from cola_train.evaluation.writing import verify as module
from cola_train.evaluation.writing.config import VerificationConfig
from cola_train.evaluation.writing.verify import verify, wilson
from cola_train.families.autoregressive.family import AutoregressiveRunConfig
from cola_train.families.autoregressive.objective import AutoregressiveObjective
from cola_train.families.checkpoint import Checkpoint
from cola_train.training.run import train
from tests.helpers.llama import tiny_transformer
from tests.helpers.tiny import tiny_tokenizer

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SEQ_LEN = 32
DYCK = GeneratedConfig(kind="dyck", num_documents=400, most_bytes=SEQ_LEN - 1)
CORPUS = CorpusConfig(generated=DYCK)
FEW = VerificationConfig(num_texts=3)


@pytest.fixture(scope="module")
def dyck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_dyck(tmp_path_factory.mktemp("dyck"))


def prepare_dyck(folder: Path, **changes: Any) -> Path:
    tokenizer = folder / "tokenizer.json"
    train_tokenizer(TokenizerTrainConfig(out=str(tokenizer), corpus=CORPUS, vocab_size=260))
    settings = {
        "out": str(folder / "rows"),
        "tokenizer": str(tokenizer),
        "corpus": CORPUS,
        "seq_len": SEQ_LEN,
        "document_alignment": SEQ_LEN,
        "held_out_share": 0.2,
    }
    return prepare(PrepareConfig(**{**settings, **changes})).folder


def held_out(folder: Path) -> list[str]:
    data = PreparedData.open(folder)
    rows = range(data.num_rows("validation"))
    return [data.tokenizer.decode(data.row("validation", row)[0].tolist()) for row in rows]


def test_the_interval_is_scipys() -> None:
    for trials in (*range(1, 30), 400):
        for successes in (*range(min(trials, 30) + 1), trials):
            theirs = binomtest(successes, trials).proportion_ci(method="wilson")
            assert wilson(successes, trials) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# Writers whose texts are known.


class Told:
    """In place of a checkpoint: continues each prompt with what `answer` says, ids of bytes."""

    block_tokens = 1

    def __init__(self, tokenizer: Tokenizer, answer: Callable[[str], str]) -> None:
        self.tokenizer, self._answer = tokenizer, answer
        self.asked: list[tuple[int, SamplerConfig]] = []

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        return self.block_tokens - prompt_tokens % self.block_tokens, self.block_tokens

    def identity(self) -> dict[str, Any]:
        return {"checkpoint": {"name": "told"}}

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        prompt_indices: Sequence[int],
    ) -> Iterator[Any]:
        for prompt, address in zip(prompts, prompt_indices, strict=True):
            self.asked.append((address, config))
            ids = self.tokenizer.encode(self._answer(self.tokenizer.decode(prompt)))
            kept = ids[: config.max_new_tokens]
            # The end is a token too.
            reason = "stop" if len(ids) < config.max_new_tokens else "length"
            yield types.SimpleNamespace(
                prompt_ids=list(prompt), token_ids=kept, finish_reason=reason
            )


def told(monkeypatch: pytest.MonkeyPatch, folder: Path, answer: Callable[[str], str]) -> Told:
    writer = Told(PreparedData.open(folder).tokenizer, answer)

    def generate_stream(checkpoint: Checkpoint, *rest: Any, **named: Any) -> Iterator[Any]:
        return writer.write(*rest, **named)

    monkeypatch.setattr(module, "load_checkpoint", lambda *_: writer)
    monkeypatch.setattr(module, "generate_stream", generate_stream)
    return writer


def closed(prompt: str) -> str:
    """The shortest end of a Dyck word; "()" from nothing."""
    still_open: list[str] = []
    for character in prompt or "(":
        if character in "([":
            still_open.append({"(": ")", "[": "]"}[character])
        else:
            still_open.pop()
    return ("" if prompt else "(") + "".join(reversed(still_open))


def test_who_heeds_the_prompt_and_who_does_not(dyck: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = VerificationConfig(num_texts=20, prompt_share=0.4)
    num_prompts_closed = 0
    for text in held_out(dyck)[:20]:
        num_prompts_closed += closed(text[: max(1, int(0.4 * len(text)))]) == ""
    told(monkeypatch, dyck, closed)
    page = verify(Path("told"), dyck, None, "cpu", config)
    assert page.count("20 of 20 are valid: 1.000 (95 %: 0.839 to 1.000)") == 2
    told(monkeypatch, dyck, lambda prompt: "[()]")
    from_nothing, as_completion = (
        verify(Path("told"), dyck, None, "cpu", config)
        .partition("from nothing")[2]
        .split("as a completion")
    )
    assert "20 of 20 are valid" in from_nothing
    low, high = wilson(num_prompts_closed, 20)
    assert f"{num_prompts_closed} of 20 are valid" in as_completion
    assert f"(95 %: {low:.3f} to {high:.3f})" in as_completion
    assert f"{20 - num_prompts_closed} ends before all is closed" in as_completion


def test_a_text_may_fill_its_row_and_must_end_in_it(
    dyck: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompt: str) -> str:
        return closed(prompt) if prompt else "()" * (SEQ_LEN // 2)

    writer = told(monkeypatch, dyck, answer)
    page = verify(Path("told"), dyck, None, "cpu", FEW)
    assert "0 of 3 are valid" in page
    assert "3 does not end within its row" in page
    prompts = [text[: max(1, len(text) // 2)] for text in held_out(dyck)[:3]]
    eos = writer.tokenizer.eos_token_id
    rooms = {2 * n + 1: SEQ_LEN - len(prompt) for n, prompt in enumerate(prompts)}
    rooms |= dict.fromkeys((0, 2, 4), SEQ_LEN)
    assert {place: config.max_new_tokens for place, config in writer.asked} == rooms
    assert {config.eos_token_ids for _, config in writer.asked} == {(eos,)}


def test_prompts_that_end_inside_a_block_are_told_from_others(
    dyck: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(prompt: str) -> str:
        return closed(prompt) + ")" * (len(prompt) % 4 != 0)

    writer = told(monkeypatch, dyck, answer)
    config = VerificationConfig(num_texts=60)
    lengths = [max(1, len(text) // 2) for text in held_out(dyck)[:60]]
    between = sum(length % 4 == 0 for length in lengths)
    assert 0 < between < 60
    # A writer of a token at a time has no blocks that a prompt could end in.
    page = verify(Path("told"), dyck, None, "cpu", config)
    assert f"{between} of 60 are valid" in page
    assert "block" not in page
    writer.block_tokens = 4
    from_nothing, as_completion = verify(Path("told"), dyck, None, "cpu", config).split(
        "as a completion"
    )
    assert "block" not in from_nothing
    inside_line, between_line = as_completion.splitlines()[-2:]
    low, high = wilson(0, 60 - between)
    assert (
        inside_line.split()
        == (
            f"prompt ends inside a block 0 of {60 - between} are valid: 0.000 "
            f"(95 %: {low:.3f} to {high:.3f})"
        ).split()
    )
    assert f"prompt ends with a block {between} of {between} are valid" in " ".join(
        between_line.split()
    )


def test_special_tokens_inside_a_text_are_none_of_its_language(
    dyck: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(monkeypatch, dyck, lambda prompt: "(<|pad|>)")
    page = verify(Path("told"), dyck, None, "cpu", FEW)
    assert page.count("3 has another character than a bracket") == 2


def test_the_same_call_goes_on_with_a_file_that_was_cut(
    dyck: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "texts.jsonl"
    told(monkeypatch, dyck, closed)
    page = verify(Path("told"), dyck, out, "cpu", FEW)
    whole = out.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [row["start"] for row in rows] == ["from nothing", "as a completion"] * 3
    for row, text in zip(rows[1::2], held_out(dyck), strict=False):
        assert row["prompt"] == text[: max(1, len(text) // 2)]
        assert row["text"] == row["prompt"] + closed(row["prompt"])
        assert row["fault"] is None
    out.write_text("".join(whole.splitlines(keepends=True)[1:4]))
    writer = told(monkeypatch, dyck, closed)
    assert verify(Path("told"), dyck, out, "cpu", FEW) == page
    assert sorted(place for place, _ in writer.asked) == [0, 4, 5]
    assert out.read_text() == whole
    with pytest.raises(UserError, match=r"results of another command.*prompt_share \(0\.5 there"):
        verify(Path("told"), dyck, out, "cpu", dataclasses.replace(FEW, prompt_share=0.6))


def test_the_laboratorys_autoregressive_model_learns_how_a_text_begins(dyck: Path) -> None:
    config = load_config(AutoregressiveRunConfig, CONFIGS / "small" / "ar_dyck.yaml")
    batch = next(validation_batches(PreparedData.open(dyck), num_rows=8))
    objective = AutoregressiveObjective(tiny_transformer(causal=True), config.objective)
    counts = objective.counts(batch)
    assert counts["predicted_tokens"] == batch.loss_mask.sum()


# What is refused.


def test_data_that_nothing_can_judge(prepared_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not of a generated language.*prepare it with"):
        verify(Path("any"), prepared_folder, None, "cpu", FEW)
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    data = prepare_dyck(unknown)
    manifest = PreparedData.open(data).manifest
    changed = dataclasses.replace(manifest, generated={"kind": "palindrome"})
    (data / "manifest.json").write_text(changed.to_json())
    with pytest.raises(UserError, match="not known here, palindrome; the known ones are dyck, "):
        verify(Path("any"), data, None, "cpu", FEW)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"held_out_share": 0.0}, "has no held-out rows"),
        ({"document_alignment": 1}, "a row is not a document each"),
        ({"seq_len": 16, "document_alignment": 16}, "a row is not a document each"),
    ],
)
def test_data_whose_rows_are_no_documents(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        verify(Path("any"), prepare_dyck(tmp_path, **changes), None, "cpu", FEW)


def test_data_of_another_tokenizer(dyck: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, dyck, closed).tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="another tokenizer than told"):
        verify(Path("told"), dyck, None, "cpu", FEW)


# From text to verdicts.


def cancels_out(text: str) -> bool:
    """Whether a text is a Dyck word: by taking out neighbors that close each other."""
    rest = text
    while rest != (shorter := rest.replace("()", "").replace("[]", "")):
        rest = shorter
    return bool(text) and not rest


@pytest.mark.parametrize("stage", ["ar", "llada", "joint"])
def test_any_family_is_trained_and_verified(
    stage: str,
    dyck: Path,
    joint_config: Callable[..., Any],
    baseline_config: Callable[..., Any],
    tmp_path: Path,
) -> None:
    data = f"data.path={dyck}"
    config = (
        joint_config("tiny", data) if stage == "joint" else baseline_config(stage, "tiny", data)
    )
    train(config)
    out = tmp_path / "texts.jsonl"
    settings = VerificationConfig(
        num_texts=4, sampler=dataclasses.replace(FEW.sampler, num_steps=2)
    )
    page = verify(tmp_path / "tiny", dyck, out, "cpu", settings)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for start in ("from nothing", "as a completion"):
        own = [row for row in rows if row["start"] == start]
        assert len(own) == 4
        assert all(row["text"].startswith(row["prompt"]) for row in own)
        valid = sum(row["fault"] is None for row in own)
        for row in own:
            is_valid = row["fault"] is None
            assert is_valid == cancels_out(row["text"]) or row["fault"].startswith("does not end")
        assert f"{valid} of 4 are valid" in page.partition(start)[2].splitlines()[0]

"""Sums over rows, and the `likelihood` verb on held-out rows and on texts."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cola_train.cli import main
from cola_train.config.data import CorpusConfig, PrepareConfig
from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import UserError
from cola_train.data.batch import VALIDATION_SAMPLE_OFFSET, validation_batches
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.likelihood import perplexity
from cola_train.evaluation.likelihood.likelihood import RowLikelihood, log_likelihoods
from cola_train.evaluation.likelihood.perplexity import (
    held_out_rows,
    measure,
    read_texts,
)
from cola_train.evaluation.likelihood.rates import perplexity_of
from cola_train.evaluation.likelihood.tables import table_rates
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.registry import load_checkpoint
from cola_train.likelihood.rows import ScoredRow
from tests.helpers.llama import tiny_baseline
from tests.helpers.tiny import calm, tiny_checkpoint, tiny_dit, tiny_tokenizer, tiny_vae

FAST = LikelihoodConfig(num_samples=2, num_steps=2, num_rows=3)
ODE = dataclasses.replace(FAST, method="ode")


def row(num_tokens: int, log_p: float) -> RowLikelihood:
    return RowLikelihood(num_tokens, log_p, 0.1, log_p + 1, log_p / 2, log_p, -log_p / 2)


@pytest.fixture
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


@pytest.fixture
def on_disk(data: PreparedData, tmp_path: Path) -> Callable[[str], Path]:
    """A tiny checkpoint of a family, with the data's tokenizer and vocabulary, in a folder."""

    def write(family: str) -> Path:
        folder = tmp_path / family
        if family == "cola":
            ColaCheckpoint(
                tiny_vae(vocab_size=320), calm(tiny_dit()), data.tokenizer, {"seq_len": 32}
            ).save(folder)
        else:
            baseline = tiny_baseline(causal=family == "ar", vocab_size=320)
            dataclasses.replace(baseline, tokenizer=data.tokenizer, training={"seq_len": 32}).save(
                folder
            )
        return folder

    return write


# Sums over rows


def test_rates_are_ratios_of_sums() -> None:
    found = perplexity_of(
        tiny_checkpoint(tiny_vae(), tiny_dit()),
        [row(10, -30.0), row(30, -50.0)],
        FAST,
        num_bytes=100,
    )
    assert found.nats.nats_per_token == pytest.approx(2.0)
    assert found.nats.perplexity == pytest.approx(math.exp(2.0))
    assert found.iwae is not None
    assert found.iwae.nats_per_token == pytest.approx(78 / 40)
    assert found.parts == {
        "reconstruction": pytest.approx(1.0),
        "prior": pytest.approx(2.0),
        "entropy": pytest.approx(1.0),
    }
    assert found.bits_per_byte == pytest.approx(80 / math.log(2) / 100)
    assert (found.num_rows, found.num_tokens, found.kind) == (2, 40, "bound")


def test_the_standard_error_is_the_bootstraps() -> None:
    generator = np.random.default_rng(3)
    tokens = generator.integers(5, 60, 200)
    nats = 3.0 * tokens + generator.normal(0, 20, 200)
    rows = [row(int(count), -float(total)) for count, total in zip(tokens, nats, strict=True)]
    found = perplexity_of(tiny_checkpoint(tiny_vae(), tiny_dit()), rows, FAST)
    drawn = generator.integers(0, 200, (4000, 200))
    again = nats[drawn].sum(1) / tokens[drawn].sum(1)
    assert found.nats.standard_error == pytest.approx(float(again.std()), rel=0.06)
    assert (
        perplexity_of(tiny_checkpoint(tiny_vae(), tiny_dit()), rows[:1], FAST).nats.standard_error
        is None
    )


def test_figures_have_iwaes_only_where_it_holds_and_say_what_they_are() -> None:
    cola, rows = tiny_checkpoint(tiny_vae(), tiny_dit()), [row(10, -30.0), row(30, -50.0)]
    hutchinson = perplexity_of(cola, rows, ODE).metrics()
    exact = perplexity_of(cola, rows, dataclasses.replace(ODE, divergence="exact")).metrics()
    assert exact.keys() - hutchinson.keys() == {"iwae_nats_per_token", "iwae_perplexity"}
    assert hutchinson["estimate_nats_per_token"] == pytest.approx(2.0)
    assert hutchinson["prior_nats_per_token"] == pytest.approx(2.0)
    changed = [dataclasses.replace(one, step_change=2.0) for one in rows]
    assert perplexity_of(cola, changed, ODE).metrics()["estimate_step_change"] == -0.1
    bound = perplexity_of(cola, [dataclasses.replace(one, iwae=None) for one in rows], FAST)
    assert bound.metrics()["elbo_nats_per_token"] == pytest.approx(2.0)
    assert (bound.kind, bound.iwae) == ("bound", None)
    # A difference of two bounds is none.
    assert perplexity_of(cola, rows, FAST, conditional=True).kind == "estimate"
    llada = tiny_baseline(causal=False)
    found = [RowLikelihood(10, -30.0, 0.1)] * 2
    assert perplexity_of(llada, found, ODE, conditional=True).kind == "bound"
    baseline = perplexity_of(
        tiny_baseline(causal=True), [RowLikelihood(10, -30.0, 0.0)] * 2, FAST
    ).metrics()
    assert baseline == {
        "exact_nats_per_token": 3.0,
        "exact_perplexity": pytest.approx(math.exp(3)),
        "exact_standard_error": 0.0,
    }


def test_a_hopeless_perplexity_is_infinite() -> None:
    assert (
        perplexity_of(
            tiny_baseline(causal=True), [RowLikelihood(1, -800.0, 0.0)], FAST
        ).nats.perplexity
        == math.inf
    )


# Which rows


def test_held_out_rows_are_those_of_validation(data: PreparedData) -> None:
    (batch,) = validation_batches(data, 5)
    rows = held_out_rows(data, 5, mask_documents=True)
    assert [list(one.tokens) for one in rows] == batch.tokens.tolist()
    assert (
        [one.key for one in rows]
        == batch.sample_index.tolist()
        == [VALIDATION_SAMPLE_OFFSET + number for number in range(5)]
    )
    assert [list(one.documents or ()) for one in rows] == batch.document_ids.tolist()
    assert all(one.documents is None for one in held_out_rows(data, 5, mask_documents=False))
    assert len(held_out_rows(data, None, mask_documents=False)) == data.num_rows("validation")


def test_texts_are_read_with_what_is_given(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        '{"text": "w5 w6", "id": 3}\n\n{"prompt": "w7", "continuation": "w8 w9"}\n{"prompt": "", '
        '"continuation": "w8"}\n'
    )
    rows, records = read_texts(path, tiny_tokenizer())
    assert rows == [ScoredRow([5, 6], 0), ScoredRow([7, 8, 9], 1, given=1), ScoredRow([8], 2)]
    assert records[0] == {"text": "w5 w6", "id": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no texts"),
        (b'{"text": "w5"}\n{"text"', "line 2 is not JSON"),
        (
            b'{"prompt": "w5"}',
            (
                r'line 1 must be \{"text": "\.\.\."\} or \{"prompt": "\.\.\.", "continuation": '
                r'"\.\.\."\}'
            ),
        ),
        (b'{"text": "w5", "prompt": "w5", "continuation": "w6"}', "line 1 must be"),
        (b'{"text": 5}', "line 1 must be"),
        (b'["w5"]', "line 1 must be"),
        (b'{"text": ""}', "line 1 has no token to score: its text is empty"),
        (
            b'{"prompt": "w5", "continuation": ""}',
            "line 1 has no token to score: its continuation is empty",
        ),
        (b"\xff", r"is not UTF-8 text \(byte 0\)"),
    ],
)
def test_bad_texts_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(path, tiny_tokenizer())
    with pytest.raises(UserError, match="Cannot read the texts"):
        read_texts(tmp_path / "none.jsonl", tiny_tokenizer())


# The verb


@pytest.mark.parametrize(
    ("family", "method", "label"),
    [
        ("cola", "bound", "bound"),
        ("cola", "ode", "estimate"),
        ("ar", "bound", "exact"),
        ("llada", "bound", "bound"),
    ],
)
def test_held_out_rows_from_the_command_line(
    family: str,
    method: str,
    label: str,
    on_disk: Callable[[str], Path],
    data: PreparedData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = on_disk(family), tmp_path / "rows.jsonl"
    config = dataclasses.replace(FAST, method=method)
    arguments = [
        "likelihood",
        str(folder),
        "--data",
        str(data.folder),
        "--out",
        str(out),
        "--device",
        "cpu",
        f"method={method}",
    ]
    assert main([*arguments, "num_rows=3", "num_samples=2", "num_steps=2"]) == 0
    page = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    expected = log_likelihoods(
        load_checkpoint(folder), held_out_rows(data, 3, mask_documents=False), config
    )
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert [line["log_p"] for line in lines] == pytest.approx([found.log_p for found in expected])
    nats = -sum(found.log_p for found in expected) / 96
    assert "3 rows, 96 tokens" in page
    assert f"  {label:8}  " in page
    assert f"{nats:.4f} ± " in page
    assert f"{math.exp(nats):,.4g} ± " in page
    assert ("IWAE is too low with Hutchinson's divergence" in page) == (method == "ode")
    assert ("twice as many steps: " in page) == (method == "ode")
    assert (f"{label} = reconstruction" in page) == (family == "cola")
    assert ("upper bounds by denoising" in page) == ((family, method) == ("cola", "bound"))
    # Tables of the training rows, whatever the family.
    rates = table_rates(data, 3, 320, mask_documents=False)
    for name, rate in rates.items():
        assert re.search(rf"\n  {name} +{rate.nats_per_token:.4f} ± ", page), name
    assert "  unigrams, bigrams: by tables of the training rows alone" in page
    text = out.read_text()
    assert main([*arguments, "num_rows=3", "num_samples=2", "num_steps=2"]) == 0
    assert capsys.readouterr().out == page
    assert main([*arguments, "num_rows=3", "num_samples=2", "num_steps=3"]) == 2
    assert "It differs in: likelihood.num_steps (2 there, 3 here)" in capsys.readouterr().err
    assert out.read_text() == text
    (tmp_path / "rows.jsonl.settings.json").unlink()
    assert main(arguments) == 2
    assert f"{out} exists and is not overwritten; choose another --out" in capsys.readouterr().err


def test_the_same_command_goes_on_to_the_same_bits(
    on_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, path = on_disk("cola"), tmp_path / "texts.jsonl"
    texts = ["It was a truth.", "It", "It was", "It", "a truth of it", " was a"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = LikelihoodConfig(num_samples=3, num_steps=2, batch_size=4)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    page = measure(folder, None, path, whole, "cpu", config)
    assert page.split("\n")[1:] == measure(folder, None, path, None, "cpu", config).split("\n")[1:]
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in ([], [5, 1], [0], [0, 1, 2, 4, 5], [4, 2, 1, 0, 3]):
        shutil.copy(f"{whole}.settings.json", f"{out}.settings.json")
        out.write_bytes(b"".join(lines[place] for place in kept))
        assert measure(folder, None, path, out, "cpu", config) == page
        assert out.read_bytes() == whole.read_bytes()
    out.write_bytes(whole.read_bytes().replace(b'"num_tokens": ', b'"num_tokens": null, "was": '))
    with pytest.raises(UserError, match="line 1 is no result of this command"):
        measure(folder, None, path, out, "cpu", config)
    out.write_bytes(re.sub(rb'"log_p": [^,]*', b'"log_p": "x"', whole.read_bytes(), count=1))
    with pytest.raises(UserError, match=r"out\.jsonl was changed: .* is no result"):
        measure(folder, None, path, out, "cpu", config)


def test_texts_from_the_command_line(on_disk: Callable[[str], Path], tmp_path: Path) -> None:
    folder, path, out = on_disk("cola"), tmp_path / "texts.jsonl", tmp_path / "rows.jsonl"
    records = [{"text": "It was a truth."}, {"prompt": "It was", "continuation": " a truth."}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    page = measure(folder, None, path, out, "cpu", dataclasses.replace(ODE, divergence="exact"))
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [
        {key: line[key] for key in record} for line, record in zip(lines, records, strict=True)
    ] == records
    checkpoint = ColaCheckpoint.load(folder)
    assert lines[1]["num_tokens"] == len(checkpoint.tokenizer.encode(" a truth."))
    num_bytes = len("It was a truth.") + len(" a truth.")
    bits = -sum(line["log_p"] for line in lines) / math.log(2) / num_bytes
    assert f"{bits:.4f} bits per byte" in page
    assert "IWAE is too low" not in page
    assert "  no n-gram tables beside it: with --texts no training rows are known" in page
    assert "estimate" in measure(folder, None, path, None, "cpu", FAST), "a text has a prompt"


def test_tables_beside_a_likelihood_are_of_the_same_tokens(data: PreparedData) -> None:
    number = data.num_rows(TRAIN)
    known = np.concatenate([data.row(TRAIN, row)[0] for row in range(number)])
    count = np.bincount(known, minlength=320)
    count[data.manifest.pad_token_id] = 0
    log_p = np.log((count + 0.5) / (count + 0.5).sum())
    whole = data.num_rows(VALIDATION)
    tokens = np.concatenate([data.row(VALIDATION, row)[0] for row in range(whole)])
    real = tokens[tokens != data.manifest.pad_token_id]
    found = table_rates(data, whole, 320, mask_documents=False)
    assert found["unigrams"].nats_per_token == pytest.approx(-log_p[real].mean())
    assert found["bigrams"].nats_per_token < found["unigrams"].nats_per_token
    # Where documents are apart, their first tokens have none before them.
    apart = table_rates(data, whole, 320, mask_documents=True)
    assert apart["unigrams"].nats_per_token == found["unigrams"].nats_per_token
    assert apart["bigrams"] != found["bigrams"]
    lacking = dataclasses.replace(
        data.manifest, splits={"validation": data.manifest.splits["validation"]}
    )
    assert table_rates(PreparedData(data.folder, lacking), 5, 320, mask_documents=False) == {}


def test_text_that_is_not_known_has_no_bits_per_byte(tmp_path: Path) -> None:
    folder, texts = tmp_path / "tiny", tmp_path / "texts.jsonl"
    tiny_checkpoint(tiny_vae(), calm(tiny_dit())).save(folder)
    texts.write_text('{"text": "w5 Fanny"}\n')
    page = measure(folder, None, texts, None, "cpu", FAST)
    assert "  no bits per byte: the text of these tokens is not known\n" in page


def test_a_text_longer_than_training_saw_is_told_once(
    on_disk: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        json.dumps({"text": "It was a truth universally acknowledged. " * 4})
        + "\n"
        + '{"text": "It"}\n',
        encoding="utf-8",
    )
    with pytest.warns(
        UserWarning,
        match=r"1 of 2 texts, the longest of \d+ tokens, are longer than the rows of 32 tokens",
    ):
        measure(on_disk("ar"), None, path, None, "cpu", FAST)


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_checkpoint_that_keeps_documents_apart_is_measured_so(
    mask_documents: bool, on_disk: Callable[[str], Path], data: PreparedData, tmp_path: Path
) -> None:
    # Documents here do not begin on block boundaries, which only training refuses.
    checkpoint, folder, out = (
        ColaCheckpoint.load(on_disk("cola")),
        tmp_path / "apart",
        tmp_path / "rows.jsonl",
    )
    dataclasses.replace(checkpoint, training={"mask_documents": mask_documents}).save(folder)
    measure(folder, data.folder, None, out, "cpu", dataclasses.replace(FAST, num_rows=None))
    found = [json.loads(line)["log_p"] for line in out.read_text(encoding="utf-8").splitlines()]
    expected, other = (
        log_likelihoods(checkpoint, held_out_rows(data, None, apart), FAST)
        for apart in (mask_documents, not mask_documents)
    )
    assert found == pytest.approx([one.log_p for one in expected], abs=1e-3)
    assert any(abs(one - two.log_p) > 0.01 for one, two in zip(found, other, strict=True))


@pytest.mark.parametrize(
    ("layer", "value", "config"),
    [
        ("bias", 1e38, ODE),
        # The bound squares a velocity in float64, so that it must itself be infinite.
        ("weight", 3e38, FAST),
    ],
)
def test_a_likelihood_that_is_not_finite_is_refused(
    layer: str,
    value: float,
    config: LikelihoodConfig,
    on_disk: Callable[[str], Path],
    data: PreparedData,
    tmp_path: Path,
) -> None:
    checkpoint, out = ColaCheckpoint.load(on_disk("cola")), tmp_path / "rows.jsonl"
    assert checkpoint.dit is not None
    with torch.no_grad():
        getattr(checkpoint.dit.txt_out.proj, layer).fill_(value)
    checkpoint.save(tmp_path / "diverged")
    with pytest.raises(
        UserError,
        match=r"log p of row \d is not finite \(.*\), like that of 2 other rows: the checkpoint",
    ):
        measure(tmp_path / "diverged", data.folder, None, out, "cpu", config)
    assert out.read_text() == ""


def test_one_row_that_is_not_finite_is_named_after_all_others(
    on_disk: Callable[[str], Path],
    data: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, out = on_disk("ar"), tmp_path / "rows.jsonl"
    real = perplexity.log_likelihoods_stream

    def one_bad(*given: Any) -> Iterator[tuple[int, RowLikelihood]]:
        for number, found in real(*given):
            yield number, dataclasses.replace(found, log_p=math.nan) if number == 1 else found

    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "log_likelihoods_stream", one_bad)
        with pytest.raises(
            UserError, match=r"log p of row 1 is not finite \(nan\): the checkpoint"
        ):
            measure(folder, data.folder, None, out, "cpu", FAST)
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [0, 2]
    measure(folder, data.folder, None, out, "cpu", FAST)
    assert [json.loads(line)["row"] for line in out.read_text().splitlines()] == [0, 1, 2]


def test_data_that_does_not_fit_is_refused(
    on_disk: Callable[[str], Path], data: PreparedData, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    tiny_baseline(causal=True).save(stranger)
    with pytest.raises(
        UserError,
        match=(
            r"has another tokenizer than .*; give data that was prepared with the checkpoint's own"
        ),
    ):
        measure(stranger, data.folder, None, None, "cpu", FAST)
    book, out = data.folder.parent / "book.txt", tmp_path / "rows"
    corpus = CorpusConfig(inputs=[str(book)])
    prepare(
        PrepareConfig(
            out=str(out),
            tokenizer=str(data.folder.parent / "tokenizer.json"),
            corpus=corpus,
            seq_len=32,
            held_out_share=0,
        )
    )
    with pytest.raises(
        UserError, match=r"has no held-out rows; prepare it with held_out_share above 0"
    ):
        measure(on_disk("cola"), out, None, None, "cpu", FAST)


@pytest.mark.parametrize("arguments", [[], ["--data", "x", "--texts", "y"]])
def test_either_data_or_texts(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["likelihood", "nowhere", *arguments]) == 2
    assert (
        "Give either --data FOLDER (prepared data) or --texts FILE.jsonl."
        in capsys.readouterr().err
    )

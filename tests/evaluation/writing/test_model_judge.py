"""A model as judge: its figure against the same written out, and which judges are refused."""

import dataclasses
import itertools
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_train.config.data import CorpusConfig, PrepareConfig, TokenizerTrainConfig
from cola_train.config.settings import UserError
from cola_train.data.prepare import prepare
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.data.tokenizer_training import train_tokenizer
from cola_train.evaluation.writing.compare import compare_run
from cola_train.evaluation.writing.comparison import (
    Judges,
    compare_in_pairs,
    held_out_openings,
)
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.model_judge import ModelJudge
from cola_train.evaluation.writing.words import decode_row
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.transformer.family import BaselineRunConfig
from cola_train.run_layout import folder_of, run_of
from cola_train.training.run import train
from tests.helpers.benchmarks import byte_tokenizer
from tests.helpers.llama import tiny_baseline, tiny_transformer
from tests.helpers.runs import BOOK, figures

NUM_NEW = 12
CONFIG = ComparisonConfig(num_openings=20, num_new_tokens=NUM_NEW)
NAME = "model_judge_nats_per_byte"
SHORT = ComparisonConfig(num_openings=6, num_new_tokens=8, brier_places=0)
Configs = Callable[..., BaselineRunConfig]


@pytest.fixture
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


def judge_of(tokenizer: Tokenizer, training: dict[str, object] | None = None) -> ModelJudge:
    network = tiny_transformer(causal=True, vocab_size=tokenizer.vocab_size)
    checkpoint = AutoregressiveCheckpoint(network, tokenizer)
    return ModelJudge(dataclasses.replace(checkpoint, training=training or {}))


def figure(judge: ModelJudge, data: PreparedData, texts: list[list[int]]) -> tuple[float, float]:
    """Of these texts after the openings, and of the real ones."""
    writer = (lambda prompts, num_new: texts,) * 2
    judges = Judges.train(data, CONFIG, judge)
    found = compare_in_pairs([writer], judges, data, CONFIG)[0][0].estimates
    return found[NAME].value, found[f"held_out_{NAME}"].value


def wild(data: PreparedData) -> list[list[int]]:
    """Continuations of other openings, some of which stop early."""
    texts = held_out_openings(data, 20, NUM_NEW)[1]
    return [*[text[: 3 + place] for place, text in enumerate(texts[1:5])], *texts[5:], *texts[:1]]


def by_hand(judge: ModelJudge, data: PreparedData, texts: list[list[int]]) -> float:
    """Token by token, each from a pass of its own over all before it."""
    checkpoint, eos = judge.checkpoint, data.tokenizer.eos_token_id
    other = checkpoint.tokenizer
    network = checkpoint.networks["transformer"]

    def translated(ids: list[int]) -> list[int]:
        found = []
        for is_end, part in itertools.groupby(ids, lambda token: token == eos):
            text = data.tokenizer.decode([*part]).strip("\ufffd")
            found += [other.eos_token_id] if is_end else other.encode_document(text)
        return found

    nats = num_bytes = 0.0
    prompts, _ = held_out_openings(data, 20, NUM_NEW)
    for prompt, text in zip(prompts, texts, strict=True):
        ended = text if len(text) == NUM_NEW or text[-1] == eos else [*text, eos]
        given, ids = translated(prompt), translated(ended)
        limit = checkpoint.trained_seq_len or 10**6
        before = [other.eos_token_id, *given[max(0, len(given) + len(ids) - limit) :]]
        for place, token in enumerate(ids):
            seen = [*before, *ids[:place]]
            logits = network.head(network(torch.tensor([seen]))[0, -1])
            nats -= float(logits.double().log_softmax(-1)[token])
        num_bytes += len(decode_row(ended, data.tokenizer).strip("\ufffd").encode())
    return nats / num_bytes


@pytest.mark.parametrize(("same", "seq_len"), [(True, 20), (False, None), (False, 40)])
def test_it_is_the_nats_of_its_own_tokens_over_the_texts_bytes(
    data: PreparedData, same: bool, seq_len: int | None
) -> None:
    """A judge of short rows sees less of an opening."""
    judge = judge_of(data.tokenizer if same else byte_tokenizer(), {"seq_len": seq_len})
    texts, endings = wild(data), held_out_openings(data, 20, NUM_NEW)[1]
    written, real = figure(judge, data, texts)
    assert written == pytest.approx(by_hand(judge, data, texts), rel=1e-5)
    assert real == pytest.approx(by_hand(judge, data, endings), rel=1e-5)
    assert abs(written - real) > 1e-3
    if seq_len is not None:
        assert figure(judge_of(judge.checkpoint.tokenizer), data, texts)[0] != written


def test_a_judge_that_knows_nothing_charges_its_tokens_alike(data: PreparedData) -> None:
    """Of bytes, the logarithm of its vocabulary for each, whatever the writer's tokenizer."""
    judge = judge_of(byte_tokenizer())
    judge.checkpoint.networks["transformer"].lm_head.weight.zero_()
    size = math.log(judge.checkpoint.vocab_size)
    assert figure(judge, data, wild(data)) == pytest.approx((size, size), rel=1e-6)


def test_documents_are_apart_for_a_judge_that_learnt_them_apart(data: PreparedData) -> None:
    together = judge_of(data.tokenizer)
    apart = judge_of(data.tokenizer, {"mask_documents": True})
    eos = data.tokenizer.eos_token_id
    prompts, texts = [[5, 6, eos, 7, 8], [5, 6, 7, 8]], [[9, 10, eos]] * 2
    last = [[7, 8], [5, 6, 7, 8]]
    alone = together.nats_per_byte(last, texts, data.tokenizer)
    found = apart.nats_per_byte(prompts, texts, data.tokenizer)
    assert found.value == pytest.approx(alone.value, rel=1e-6)
    np.testing.assert_allclose(found.influences, alone.influences, rtol=1e-5)
    assert together.nats_per_byte(prompts, texts, data.tokenizer).value != pytest.approx(
        alone.value, rel=1e-3
    )


def test_a_text_without_a_byte_costs_nothing(data: PreparedData) -> None:
    judge, pad = judge_of(data.tokenizer), data.tokenizer.pad_token_id
    found = judge.nats_per_byte([[5, 6], [5, 6]], [[pad, pad], [7, 8]], data.tokenizer)
    alone = judge.nats_per_byte([[5, 6]], [[7, 8]], data.tokenizer)
    assert (found.value, found.count) == (pytest.approx(alone.value), alone.count)


def test_a_text_longer_than_the_judges_rows_is_refused(data: PreparedData) -> None:
    with pytest.raises(UserError, match=r"has 12 tokens of the judge's .* on rows of 12: lower"):
        figure(judge_of(data.tokenizer, {"seq_len": 12}), data, wild(data))


def test_a_bound_is_no_judge(tmp_path: Path) -> None:
    tiny_baseline(causal=False).save(tmp_path / "llada")
    with pytest.raises(UserError, match="of `cola-train llada`, is a bound"):
        ModelJudge.load(tmp_path / "llada")


def test_the_run_of_an_export(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for folder in (run / "hf", run / "marks" / "step-00000003", tmp_path / "hf"):
        folder.mkdir(parents=True)
    (run / "config.yaml").write_text("")
    assert [run_of(run / name) for name in (".", "hf", "marks/step-00000003")] == [run] * 3
    assert [run_of(folder) for folder in (run / "marks", tmp_path / "hf", tmp_path)] == [None] * 3


@pytest.fixture
def other_rows(tmp_path: Path) -> Path:
    """Later pages of the novel, as rows of another BPE."""
    book = tmp_path / "later.txt"
    book.write_bytes(lzma.decompress(BOOK.read_bytes())[80_000:120_000].rsplit(b"\n", 1)[0])
    corpus, tokenizer = CorpusConfig(inputs=[str(book)]), str(tmp_path / "later.json")
    train_tokenizer(TokenizerTrainConfig(out=tokenizer, corpus=corpus, vocab_size=300))
    prepare(
        PrepareConfig(
            out=str(tmp_path / "later"),
            tokenizer=tokenizer,
            corpus=corpus,
            seq_len=32,
            held_out_share=0.1,
        )
    )
    return tmp_path / "later"


def test_a_judge_of_other_text_is_named_and_one_of_the_same_is_refused(
    baseline_config: Configs, other_rows: Path, tmp_path: Path
) -> None:
    config = baseline_config("ar", "run", "budget.marks=[3 steps]")
    of_other = baseline_config("ar", "judge", f"data.path={other_rows}")
    train(config)
    train(of_other)
    run, judge = folder_of(config), folder_of(of_other)
    judged = dataclasses.replace(SHORT, judge=str(judge))
    table = compare_run(run, judged, against=run / "marks" / "step-00000003")
    weights = ModelJudge.load(judge).weights_xxh3
    assert f"Judge: {judge}, weights {weights}; it shares no file of training text" in table
    found = figures(run)
    assert found[6, "comparison_conditions"]["model_judge"] == weights  # type: ignore[index]
    # Nearly untrained, it spends about what its ids would cost, 2 bytes each.
    assert 1 < found[6, f"comparison/{NAME}"] < math.log(300)  # type: ignore[operator]
    assert table.count(NAME) == 3

    # A mark is compared as its run is.
    compare_run(run / "marks" / "step-00000003", SHORT)
    assert "model_judge" not in figures(run)[3, "comparison_conditions"]  # type: ignore[operator]
    assert (3, f"comparison/held_out_{NAME}") not in figures(run)

    for seen in (run, run / "hf", run / "marks" / "step-00000003"):
        with pytest.raises(UserError, match=r"both read .*book\.txt\. Train one on other files"):
            compare_run(run, dataclasses.replace(SHORT, judge=str(seen)))
    with pytest.raises(UserError, match=r"both read .*later\.txt\."):
        compare_run(run, judged, against=judge)
    (judge / "hf").rename(tmp_path / "elsewhere")
    table = compare_run(run, dataclasses.replace(SHORT, judge=str(tmp_path / "elsewhere")))
    assert "whether it has seen the text it judges is not known here" in table

"""lm-evaluation-harness itself, offline on tasks of our own, against the same figures worked out
from the checkpoints' likelihoods and texts.
"""

import dataclasses
import functools
import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from cola_train.config.evaluation import EvaluationConfig, LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.answering import answer
from cola_train.evaluation.benchmarks.prompts import build_prompt
from cola_train.evaluation.harness import HarnessModel
from cola_train.evaluation.likelihood.likelihood import conditional_scores, log_likelihoods
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate
from cola_train.likelihood.rows import ScoredRow
from tests.helpers.benchmarks import FAMILIES, make_samples, reader, text

FEW = 3  # draws of a bound
TEXTS = ["A ball was given.", "Her sister walked to the hall, and spoke of a letter to him."]
Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _apart_from_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no cache of the user's, and no `pip list` after each evaluation."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Evaluate a checkpoint on a task of these settings and records, by the harness."""

    def evaluate(
        checkpoint: Checkpoint,
        records: list[dict[str, Any]],
        model_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        write_task(tmp_path / "tasks", records, **settings)
        folder = tmp_path / "checkpoint"
        checkpoint.save(folder, replace=folder.exists())
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model="cola",
            model_args={
                "checkpoint": str(folder),
                "likelihood.num_samples": FEW,
                **(model_args or {}),
            },
            tasks=["tiny"],
            task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
            bootstrap_iters=0,
        )
        return found

    return evaluate


def write_task(folder: Path, records: list[dict[str, Any]], **settings: Any) -> None:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "tiny.jsonl").write_text(lines, encoding="utf-8")
    task = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tiny.jsonl")}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **settings,
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def test_options_are_chosen_as_our_own_evaluation_chooses_them(run: Run) -> None:
    checkpoint, samples = reader("ar"), make_samples("obqa", 12)
    records = [
        {
            "prompt": build_prompt("obqa", sample),
            "choices": [*sample.choices],
            "label": sample.choices.index(sample.ground_truth),
        }
        for sample in samples
    ]
    found = run(
        checkpoint,
        records,
        output_type="multiple_choice",
        doc_to_text="prompt",
        doc_to_choice="choices",
        doc_to_target="label",
        metric_list=[metric("acc")],
    )
    ours = [*answer(checkpoint, "obqa", samples, EvaluationConfig(choose_by="likelihood"))]
    scores = {one.id: one.scores for one in ours}
    for sample, logged in zip(samples, found["samples"]["tiny"], strict=True):
        theirs = [log_p for log_p, _ in logged["filtered_resps"]]
        assert theirs == pytest.approx(scores[sample.id], rel=1e-5)
    right = [one.generation == one.ground_truth for one in ours]
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(sum(right) / 12)
    assert 0 < sum(right) < 12
    assert found["config"]["likelihood_kind"] == "exact"
    weights = checkpoint.identity()["checkpoint"]["weights_xxh3"]
    assert found["config"]["checkpoint"]["weights_xxh3"] == weights


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_after_a_prompt_has_our_likelihood_and_is_greedy_if_we_write_it(
    run: Run, family: str
) -> None:
    """Half of the answers are what greedy decoding gives."""
    checkpoint, sampler = reader(family), SamplerConfig(num_steps=3)
    own = dataclasses.replace(sampler, guidance_scale=1.0, repetition_penalty=1.0, max_new_tokens=1)
    decode, encode = checkpoint.tokenizer.decode, checkpoint.tokenizer.encode
    generator = random.Random(4)
    some = [text(generator, 4) for _ in range(60)]
    addresses = [HarnessModel.address(context) for context in some]
    written = [one.decoded_ids for one in generate(checkpoint, some, own, None, addresses)]
    # Bytes that are no text by themselves cannot be asked for.
    greedy = [
        (context, decode(ids))
        for context, ids in zip(some, written, strict=True)
        if encode(decode(ids)) == ids
    ]
    contexts, answers = zip(*greedy[:2], ("the hall", " to him"), ("", " was he"))
    found = run(
        checkpoint,
        [{"context": context, "answer": after} for context, after in zip(contexts, answers)],
        {"sampler.num_steps": 3},
        output_type="loglikelihood",
        doc_to_text="context",
        doc_to_target="answer",
        target_delimiter="",
        metric_list=[metric("acc")],
    )
    config = LikelihoodConfig(num_samples=FEW)
    logged = found["samples"]["tiny"]
    for context, answered, sample in zip(contexts, answers, logged, strict=True):
        ((log_p, is_greedy),) = sample["filtered_resps"]
        ids = encode(answered)
        (result,) = generate(
            checkpoint,
            [context],
            dataclasses.replace(own, max_new_tokens=len(ids)),
            prompt_indices=[HarnessModel.address(context)],
        )
        assert is_greedy == (result.decoded_ids == ids)
        if family == "ar":

            def after(given: list[int], ids: list[int] = ids) -> torch.Tensor:
                network = checkpoint.networks["transformer"]
                hidden = network(torch.tensor([[*given, *ids]]))[0, len(given) - 1 : -1]
                logits: torch.Tensor = network.head(hidden).double()
                return logits.log_softmax(-1)

            eos, given = checkpoint.tokenizer.eos_token_id, encode(context)
            expected = float(after([eos, *given])[range(len(ids)), ids].sum())
            assert log_p == pytest.approx(expected, rel=1e-5)
            # Sampling begins with the prompt as it is.
            assert is_greedy == (after(given or [eos]).argmax(-1).tolist() == ids)
        else:
            key = HarnessModel.address(context)
            (bound,) = conditional_scores(checkpoint, [(encode(context), ids)], config, [key])
            assert log_p == pytest.approx(bound, rel=1e-4)
    assert found["results"]["tiny"]["acc,none"] == 2 / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_texts_have_their_likelihood_per_byte(run: Run, family: str) -> None:
    checkpoint = reader(family)
    found = run(
        checkpoint,
        [{"text": one} for one in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    rows = [ScoredRow(checkpoint.tokenizer.encode(one), HarnessModel.address(one)) for one in TEXTS]
    ours = log_likelihoods(checkpoint, rows, LikelihoodConfig(num_samples=FEW))
    bits = -sum(row.log_p for row in ours) / math.log(2)
    num_bytes = sum(len(one.encode()) for one in TEXTS)
    expected = pytest.approx(bits / num_bytes, rel=1e-4)
    assert found["results"]["tiny"]["bits_per_byte,none"] == expected


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in arguments]


def model(tmp_path: Path, checkpoint: Checkpoint, **settings: Any) -> HarnessModel:
    folder = tmp_path / "checkpoint"
    checkpoint.save(folder)
    return HarnessModel(str(folder), **settings)


def test_a_text_longer_than_the_rows_of_training_is_cut_with_a_token_before_each_part(
    tmp_path: Path,
) -> None:
    checkpoint = reader("ar")
    checkpoint.training["seq_len"] = 10
    ids = checkpoint.tokenizer.encode(TEXTS[0])
    assert len(ids) == 17
    (found,) = model(tmp_path, checkpoint).loglikelihood_rolling(
        requests("loglikelihood_rolling", (TEXTS[0],))
    )
    parts = log_likelihoods(
        checkpoint, [ScoredRow(ids[:10], 0), ScoredRow(ids[9:], 0, given=1)], LikelihoodConfig()
    )
    assert found == pytest.approx(sum(part.log_p for part in parts), rel=1e-5)


def test_texts_are_written_to_a_tasks_stops_and_settings(run: Run) -> None:
    checkpoint = reader("ar")
    prompts = ["He walked", "a carriage", "of"]
    own = SamplerConfig(
        max_new_tokens=20, temperature=0.8, top_p=1.0, top_k=0, repetition_penalty=1.0
    )
    addresses = [HarnessModel.address(prompt) for prompt in prompts]
    whole = [one.text for one in generate(checkpoint, prompts, own, None, addresses)]
    first, second = whole[0][4], whole[2][6:8]
    cut = [one.split(first)[0].split(second)[0] for one in whole]
    found = run(
        checkpoint,
        [{"prompt": one, "answer": cut[0]} for one in prompts],
        {"sampler.top_k": 0, "sampler.repetition_penalty": 1.0},
        output_type="generate_until",
        doc_to_text="prompt",
        doc_to_target="answer",
        generation_kwargs={
            "until": [first, second],
            "max_gen_toks": 20,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 1.0,
        },
        metric_list=[metric("exact_match")],
    )
    assert [one["filtered_resps"][0] for one in found["samples"]["tiny"]] == cut
    assert len(cut[0]) <= 4
    assert len(cut[2]) <= 6
    assert found["results"]["tiny"]["exact_match,none"] == pytest.approx(1 / 3)


def test_greedy_is_the_rule_and_a_repeated_request_draws_anew(tmp_path: Path) -> None:
    ours = model(tmp_path, reader("ar"), **{"sampler.repetition_penalty": 1.0})
    greedy = [{"until": [], "max_gen_toks": 8, "temperature": t} for t in (0.0, 0.7)]
    greedy[1]["do_sample"] = False
    sampled = {"until": "", "max_gen_toks": 8, "do_sample": True, "top_k": 0}
    texts = ours.generate_until(
        requests(
            "generate_until",
            *(("He", one) for one in greedy),
            *(("He", sampled) for _ in range(3)),
        )
    )
    assert texts[0] == texts[1]
    assert len({*texts[2:]}) == 3
    again = ours.generate_until(requests("generate_until", *(("He", sampled) for _ in range(5))))
    assert again[2:] == texts[2:]


def test_what_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    ours = model(tmp_path, reader("ar"), batch_size="2", device="cpu")
    assert (ours.config.sampler.batch_size, ours.config.likelihood.batch_size) == (2, 2)
    with pytest.raises(UserError, match="generation_kwargs have num_beams, and there is no such"):
        ours.generate_until(requests("generate_until", ("He", {"until": [], "num_beams": 2})))
    with pytest.raises(UserError, match=r"guidence_scale.*guidance_scale"):
        HarnessModel(str(tmp_path / "checkpoint"), **{"sampler.guidence_scale": 2})
    with pytest.raises(UserError, match=r"likelihood\.method=ode also scores"):
        HarnessModel(str(tmp_path / "checkpoint"), **{"likelihood.method": "ode"})


def test_the_harness_program_knows_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(
        tmp_path / "tasks",
        [{"text": one} for one in TEXTS],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="text",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    reader("ar").save(tmp_path / "checkpoint")
    # The thousands of tasks that it brings take long to read.
    ours_alone = functools.partialmethod(TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(TaskManager, "__init__", ours_alone)
    words = ["--model", "cola", "--model_args", f"checkpoint={tmp_path / 'checkpoint'}"]
    words += ["--tasks", str(tmp_path / "tasks" / "tiny.yaml"), "--batch_size", "8"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words])
    cli_evaluate()
    assert "bits_per_byte" in capsys.readouterr().out

"""The baselines train through the same loop: alike on any number of processes, after any
interruption, and as exported.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch

from cola_train.config.settings import UserError
from cola_train.data.batch import validation_batches
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.compare import compare_run
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.families.autoregressive.objective import AutoregressiveObjective
from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective
from cola_train.families.registry import load_checkpoint
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.families.transformer.family import BaselineRunConfig
from cola_train.objectives.objective import Objective, total_loss
from cola_train.run_layout import folder_of
from cola_train.training.loop import step_log
from cola_train.training.run import train
from tests.helpers.runs import figures
from tests.training.parallel.test_strategies import draws, steps, train_all

Configs = Callable[..., BaselineRunConfig]
LOSSES = {"ar": "next_token_nats_per_token", "llada": "masked_diffusion_nats_per_token"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", LOSSES)
def test_processes_and_accumulation_do_not_change_a_baseline(
    baseline_config: Configs, tmp_path: Path, stage: str
) -> None:
    # Eight documents a row are shorter than a row of LLaDA's masks: rows count different numbers of
    # tokens.
    shared = [
        "trainer.global_batch_size=8",
        "trainer.max_steps=12",
        f"objective.mask_documents={str(stage == 'ar').lower()}",
    ]
    alone = baseline_config(stage, "alone", *shared, "trainer.micro_batch_size=8")
    split = baseline_config(
        stage, "split", *shared, "trainer.micro_batch_size=2", "parallel.strategy=fsdp2"
    )
    train_all({"alone": alone}, 1, tmp_path)
    train_all({"split": split}, 2, tmp_path)
    one, two = folder_of(alone), folder_of(split)
    assert steps(one) == steps(two)
    assert draws(one) == draws(two)
    assert len(draws(one)) == (0 if stage == "ar" else 2 * 5 + 2 * 12 * 8)
    found, expected = figures(two), figures(one)
    assert found.keys() == expected.keys()
    for key in (key for key in expected if key[1].endswith(("/loss", LOSSES[stage]))):
        assert found[key] == pytest.approx(expected[key], rel=1e-5)


@pytest.mark.parametrize("stage", LOSSES)
def test_an_interrupted_baseline_ends_as_if_it_had_not_been(
    baseline_config: Configs, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = baseline_config(stage, "whole"), baseline_config(stage, "broken")
    train(whole)
    write = step_log.StepLog.write

    def stop_at_two(self: step_log.StepLog, step: step_log.Step) -> None:
        write(self, step)
        if step.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(step_log.StepLog, "write", stop_at_two)
    assert train(broken).state == "interrupted"
    assert train(broken).state == "finished"
    assert figures(folder_of(broken)) == figures(folder_of(whole))
    ours, theirs = (
        load_checkpoint(folder_of(config)).networks["transformer"].state_dict()
        for config in (broken, whole)
    )
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("stage", LOSSES)
def test_an_export_is_what_was_validated(baseline_config: Configs, stage: str) -> None:
    config = baseline_config(
        stage, "run", "trainer.sample_every_steps=3", "trainer.validation_rows=5"
    )
    train(config)
    run = folder_of(config)
    checkpoint = load_checkpoint(run)
    assert isinstance(checkpoint, TransformerCheckpoint)
    assert checkpoint.training == {
        "stage": stage,
        "step": 6,
        "seq_len": 32,
        "run": "run",
        "mask_documents": False,
    }
    objective: Objective
    if stage == "ar":
        objective = AutoregressiveObjective(checkpoint.transformer, config.objective)  # type: ignore[attr-defined]
    else:
        objective = MaskedDiffusionObjective(checkpoint.transformer, config.objective, config.seed)  # type: ignore[attr-defined]
    (batch,) = validation_batches(PreparedData.open(config.data.path), 5)
    with torch.no_grad():
        loss = total_loss(objective(batch), objective.counts(batch))
    assert float(loss) == pytest.approx(figures(run)[6, "validation/loss"], rel=1e-5)
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2


def test_a_comparison_goes_into_the_metrics(baseline_config: Configs, tmp_path: Path) -> None:
    config = baseline_config("ar", "run")
    train(config)
    run = folder_of(config)
    before = figures(run)
    text = compare_run(run, ComparisonConfig(num_openings=6, num_new_tokens=8))
    found = figures(run)
    assert {key: found[key] for key in before} == before
    assert 0 < found[6, "comparison/judge_nats_per_token"] < 10  # type: ignore[operator]
    assert found[6, "comparison/judge_nats_per_token_standard_error"] > 0  # type: ignore[operator]
    assert "6 held-out openings, 8 new tokens after each" in text
    itself = compare_run(run, ComparisonConfig(num_openings=6, num_new_tokens=8), against=run)
    assert text in itself
    lines = itself.split("in pairs (95 % interval):")[1].split("\n")
    assert {line.split()[1] for line in lines if line} == {"+0.0000"}
    conditions = cast(dict[str, object], found[6, "comparison_conditions"])
    assert conditions["row_tokens"] == 32
    assert {len(cast(str, conditions[name])) for name in ("judge", "byte_judge")} == {64}
    assert found[6, "comparison/brier_lm"] is not None
    checkpoint = load_checkpoint(run)
    checkpoint.training["seq_len"] = 64
    checkpoint.save(tmp_path / "longer")
    with pytest.raises(UserError, match=r"row_tokens \(64 for .*longer, 32 for .* same length\."):
        compare_run(run, ComparisonConfig(), against=tmp_path / "longer")
    with pytest.raises(UserError, match="is not a run folder"):
        compare_run(tmp_path / "longer", ComparisonConfig())


def test_a_vocabulary_below_the_tokenizers_is_refused(baseline_config: Configs) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"transformer.vocab_size \(100\) is below the data's tokenizer.*set "
            r"transformer.vocab_size=320"
        ),
    ):
        train(baseline_config("ar", "small", "transformer.vocab_size=100"))

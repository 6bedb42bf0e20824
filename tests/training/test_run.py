"""Whole runs: what they leave, that they repeat, that they resume, that they are never
overwritten.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.run_folder import Status
from cola_train.run_layout import CLOCKS, folder_of
from cola_train.training.callbacks.validation import Validation
from cola_train.training.checkpoints.folder import (
    intact_manifest,
    latest_checkpoint,
    saved_steps,
    step_folder,
)
from cola_train.training.loop.module import StageModule
from cola_train.training.run import export_run, resume, train
from tests.helpers.runs import figures


def start(config: RunConfig) -> Path:
    """Train, or go on with, the config's run; returns its folder."""
    train(config)
    return folder_of(config)


VAEConfigs = Callable[..., VAERunConfig]
JointConfigs = Callable[..., JointRunConfig]


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of one kind, without clock readings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in CLOCKS}
        for line in lines
        if any(k.startswith(f"{kind}/") for k in line)
    ]


def weights(run: Path, part: str) -> dict[str, Tensor]:
    return load_file(run / "hf" / "cola_dlm" / part / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_stage_1_leaves_config_metrics_plot_checkpoints_and_an_export_that_loads(
    vae_config: VAEConfigs, loss_plots: None
) -> None:
    run = start(vae_config("vae"))
    train, validation = rows(run, "train"), rows(run, "validation")
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in validation] == [3, 6]
    terms = {
        "reconstruction_nats_per_token",
        "kl_nats_per_token",
        "mask_nats_per_masked_token",
        "vae_log_snr",
    }
    assert {f"train/{term}" for term in terms} <= train[0].keys()
    assert {f"validation/{term}" for term in terms} <= validation[0].keys()
    assert train[-1]["train/loss"] < train[0]["train/loss"]
    assert validation[-1]["validation/loss"] < validation[0]["validation/loss"]
    config, last = vae_config("vae").objective, train[-1]
    by_hand = (
        last["train/reconstruction_nats_per_token"]
        + config.kl_weight * last["train/kl_nats_per_token"]
        + config.mask_weight * last["train/mask_nats_per_masked_token"]
    )
    assert last["train/loss"] == pytest.approx(by_hand, rel=1e-6)
    assert (run / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert saved_steps(run) == [3, 6]
    assert latest_checkpoint(run).name == "step-00000006"
    checkpoint = ColaCheckpoint.load(run)
    assert checkpoint.dit is None
    assert checkpoint.trained_seq_len == 32


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    joint_config: JointConfigs,
) -> None:
    whole = start(joint_config("whole"))
    part = start(joint_config("part", "trainer.max_steps=3"))
    assert [row["step"] for row in rows(part, "train")] == [1, 2, 3]
    train(resume(part, JointRunConfig, ["trainer.max_steps=6"]))
    assert rows(part, "train") == rows(whole, "train")
    assert rows(part, "validation") == rows(whole, "validation")
    for network in ("cola_vae", "cola_dit"):
        assert same(weights(part, network), weights(whole, network))
    assert (part / "config.before-1.yaml").is_file()


def test_neither_micro_batches_nor_processes_change_the_numbers(joint_config: JointConfigs) -> None:
    documents = ["objective.flow.prompt_block_prob=0.5"]
    whole = start(joint_config("whole", *documents))
    cut = start(joint_config("cut", "trainer.micro_batch_size=1", *documents))
    for kind in ("train", "validation"):
        for a, b in zip(rows(whole, kind), rows(cut, kind), strict=True):
            assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


def test_export_of_a_saved_step_equals_the_export_at_the_end(
    vae_config: VAEConfigs, tmp_path: Path
) -> None:
    run = start(vae_config("vae"))
    assert same(
        load_exported(export_run(run, None, tmp_path / "six", 10**9)), weights(run, "cola_vae")
    )
    assert not same(
        load_exported(export_run(run, 3, tmp_path / "three", 10**9)), weights(run, "cola_vae")
    )
    with pytest.raises(UserError, match=r"has no checkpoint of step 4; it has \[3, 6\]"):
        export_run(run, 4, None, 10**9)
    with pytest.raises(UserError, match="exists and is not overwritten"):
        export_run(run, 3, tmp_path / "six", 10**9)
    assert export_run(run, 3, None, 10**9) == run / "hf"
    assert same(load_exported(tmp_path / "three"), weights(run, "cola_vae"))


def load_exported(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "cola_dlm" / "cola_vae" / "model.safetensors")


def test_only_the_newest_checkpoints_are_kept(vae_config: VAEConfigs) -> None:
    run = start(vae_config("vae", "checkpoint.every_steps=1", "checkpoint.keep=2"))
    assert saved_steps(run) == [5, 6]


def test_a_run_is_never_overwritten(vae_config: VAEConfigs) -> None:
    run = start(vae_config("vae", "trainer.max_steps=1"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        UserError,
        match=(
            r"holds another run, which is not overwritten: it differs in seed: 66, now 1\. Choose"
        ),
    ):
        start(vae_config("vae", "seed=1"))
    (run.parent / "notes").mkdir()
    (run.parent / "notes" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match=r"notes exists, is not a run .* and is not overwritten"):
        start(vae_config("notes"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert [path.name for path in (run.parent / "notes").iterdir()] == ["mine.txt"]


def test_the_same_command_again_goes_on_and_a_finished_run_stays_as_it_is(
    vae_config: VAEConfigs, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(vae_config("vae", "trainer.max_steps=3", "optim.decay=20"))
    start(vae_config("vae", "trainer.max_steps=5", "optim.decay=20"))
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3, 4, 5]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert train(vae_config("vae", "trainer.max_steps=5", "optim.decay=20")) == Status(
        "finished", 5
    )
    assert (
        "is finished at step 5; a larger trainer.max_steps or budget goes on with it"
        in capsys.readouterr().err
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_resume_refuses(vae_config: VAEConfigs, tmp_path: Path) -> None:
    run = start(vae_config("vae", "trainer.max_steps=1"))
    with pytest.raises(UserError, match="is a run of `cola-train vae`"):
        resume(run, JointRunConfig)
    with pytest.raises(UserError, match=r"differs in seed: 66, now 1"):
        train(resume(run, VAERunConfig, ["seed=1"]))
    with pytest.raises(UserError, match=r"is not a run folder: it has no config.yaml"):
        resume(tmp_path, VAERunConfig)
    (run / "lightning" / "latest").write_text("step-00000009\n")
    with pytest.raises(
        UserError, match=r"names step-00000009, which is not there; steps present: \[1\]"
    ):
        train(resume(run, VAERunConfig))
    (run / "lightning" / "latest").unlink()
    (run / "lightning" / "step-00000001" / "manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"it has checkpoints of steps \[1\] but no `latest` naming one"
    ):
        train(resume(run, VAERunConfig))


def test_stage_2_starts_from_stage_1_and_fix_leaves_the_vae_as_it_was(
    vae_config: VAEConfigs, joint_config: JointConfigs
) -> None:
    vae_run = start(vae_config("vae"))
    fixed = start(
        joint_config("fixed", f"init_vae_from={vae_run}", "objective.vae_strategy.mode=fix")
    )
    assert same(weights(fixed, "cola_vae"), weights(vae_run, "cola_vae"))
    joint = start(
        joint_config("joint", f"init_vae_from={vae_run}", "objective.reference_weight=0.01")
    )
    assert not same(weights(joint, "cola_vae"), weights(vae_run, "cola_vae"))
    assert "train/reference_kl_nats_per_token" in rows(joint, "train")[0]
    # The first joint step starts at the reference itself.
    assert rows(joint, "train")[0]["train/reference_kl_nats_per_token"] == pytest.approx(
        0, abs=1e-4
    )
    both = start(
        joint_config(
            "both", f"init_vae_from={joint}", f"init_dit_from={joint}", "trainer.max_steps=1"
        )
    )
    assert rows(both, "train")[0]["train/flow_mse"] < rows(joint, "train")[0]["train/flow_mse"]


def test_interval_trains_the_vae_in_its_joint_phase_only(joint_config: JointConfigs) -> None:
    strategy = [
        "objective.vae_strategy.mode=interval",
        "objective.vae_strategy.joint_steps=2",
        "objective.vae_strategy.frozen_steps=2",
    ]
    two, four, five = (
        start(joint_config(f"run{n}", *strategy, f"trainer.max_steps={n}", "optim.decay=20"))
        for n in (2, 4, 5)
    )
    assert same(weights(two, "cola_vae"), weights(four, "cola_vae"))
    assert not same(weights(two, "cola_dit"), weights(four, "cola_dit"))
    assert not same(weights(four, "cola_vae"), weights(five, "cola_vae"))
    assert "train/reconstruction_nats_per_token" not in rows(four, "train")[2]


def test_a_fixed_log_snr_is_held_and_exported(vae_config: VAEConfigs) -> None:
    run = start(vae_config("vae", "objective.fixed_log_snr=1.5"))
    # E[mu^2] is 1 but for the norm's epsilon.
    assert rows(run, "train")[-1]["train/vae_log_snr"] == pytest.approx(1.5, abs=1e-3)
    posterior = ColaCheckpoint.load(run).vae.encode(torch.arange(32)[None])
    assert torch.allclose(posterior.logvar, torch.tensor(-1.5))


def test_sample_texts_and_wandb_files_stay_in_the_run_folder(joint_config: JointConfigs) -> None:
    run = start(
        joint_config(
            "joint",
            "trainer.max_steps=2",
            "trainer.sample_every_steps=2",
            "trainer.sample_prompts=['',She was]",
            "wandb.enabled=true",
        )
    )
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(2, ""), (2, "She was")]
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))


def test_data_tokenizer_and_checkpoint_must_fit(
    vae_config: VAEConfigs, joint_config: JointConfigs, tmp_path: Path, prepared_folder: Path
) -> None:
    with pytest.raises(
        UserError, match=r"vae.vocab_size \(300\) is below the data's tokenizer, which has 320 ids"
    ):
        start(vae_config("small", "vae.vocab_size=300"))
    with pytest.raises(UserError, match=r"seq_len"):
        start(vae_config("long", "data.seq_len=64"))
    with pytest.raises(
        UserError, match=r"mask_documents needs documents that start on block boundaries"
    ):
        start(joint_config("documents", "objective.mask_documents=true"))
    assert not (tmp_path / "small").exists()
    vae_run = start(vae_config("vae", "trainer.max_steps=1"))
    with pytest.raises(
        UserError, match=r"does not fit this run's config \(vae.dim: checkpoint 16, config 32\)"
    ):
        start(joint_config("wide", f"init_vae_from={vae_run}", "vae.dim=32"))
    assert not (tmp_path / "wide").exists()
    tokenizer = vae_run / "hf" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(UserError, match="tokenizer"):
        start(joint_config("other", f"init_vae_from={vae_run}"))
    assert not (tmp_path / "other").exists()


def test_a_validation_cut_short_is_done_when_the_run_goes_on(
    joint_config: JointConfigs, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(joint_config("whole"))
    means = Validation._means

    def asked(validation: Validation, module: StageModule) -> dict[str, float] | None:
        module.stop.signal_name = "SIGTERM"
        return means(validation, module)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_means", asked)
        assert train(joint_config("part")) == Status("interrupted", 3, "SIGTERM")
    part = folder_of(joint_config("part"))
    assert not intact_manifest(step_folder(part, 3)).good
    assert rows(part, "validation") == []
    assert train(joint_config("part")) == Status("finished", 6)
    assert figures(part) == figures(folder_of(joint_config("whole")))

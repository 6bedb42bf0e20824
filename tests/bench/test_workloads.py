"""What is measured is what the documents say: sizes, the paper's runs, random weights
everywhere.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

from cola_train.bench.config import (
    BenchGrowthConfig,
    BenchQualityConfig,
    BenchSampleConfig,
    BenchTrainConfig,
    split_settings,
)
from cola_train.bench.workloads import checkpoint, random_batch, randomize, run_config, workloads
from cola_train.config.load import load_config, to_yaml
from cola_train.config.settings import UserError
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import JointRunConfig
from cola_train.families.registry import load_run_config
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from tests.helpers.tiny import tiny_dit

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def joint(name: str, *of_run: str, **changes: int) -> JointRunConfig:
    config = run_config(BenchTrainConfig(workload=name, **changes), of_run)
    assert isinstance(config, JointRunConfig)
    return config


@pytest.mark.parametrize(
    "name, dit_millions, vae_millions, batch",
    [("M", 22.0, 7.5, (2, 512)), ("S", 1.3, 1.0, (8, 256))],
)
def test_small_workloads_have_their_sizes(
    name: str, dit_millions: float, vae_millions: float, batch: tuple[int, int]
) -> None:
    config = joint(name)
    with torch.device("meta"):
        networks = BlockCausalDiT(config.dit), TextVAE(config.vae)
    counts = [
        sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks
    ]
    assert [round(count, 1) for count in counts] == [dit_millions, vae_millions]
    assert (config.trainer.global_batch_size, config.data.seq_len) == batch
    # An encoder without gradient, the flow-matching loss alone, in fp32.
    assert not config.objective.vae_strategy.trains_vae(0)
    assert (config.dit.block_size, config.trainer.precision, config.optim.gradient_clip) == (
        16,
        "fp32",
        1.0,
    )


@pytest.mark.parametrize("name, file", [("paper_stage1", "vae"), ("paper_stage2", "joint")])
def test_the_papers_runs_are_those_of_their_config_files(name: str, file: str) -> None:
    ours, theirs = (
        run_config(BenchTrainConfig(workload=name)),
        load_run_config(CONFIGS / "paper" / f"{file}.yaml"),
    )
    assert ours.trainer.micro_batch_size == ours.trainer.global_batch_size == 8
    for section in ("vae", "dit", "objective", "optim", "parallel", "budget", "ema"):
        assert getattr(ours, section, None) == getattr(theirs, section, None), section
    same = {"micro_batch_size": 1, "global_batch_size": 1}
    assert dataclasses.replace(ours.trainer, **same) == dataclasses.replace(theirs.trainer, **same)
    assert ours.data.seq_len == theirs.data.seq_len


def test_a_batch_is_said_by_the_bench_or_by_the_run() -> None:
    of_run = ["trainer.micro_batch_size=4", "trainer.global_batch_size=12", "data.seq_len=64"]
    for config in (joint("S", *of_run), joint("S", rows=4, micro_batches=3, seq_len=64)):
        assert (
            config.trainer.micro_batch_size,
            config.trainer.global_batch_size,
            config.data.seq_len,
        ) == (4, 12, 64)
    assert joint("S", *of_run, rows=2).trainer.global_batch_size == 6  # as many micro-batches


def test_a_runs_file_is_a_workload(tiny_run: Path, tmp_path: Path) -> None:
    config = run_config(
        BenchTrainConfig(workload=str(tiny_run)), ["parallel.activation_checkpointing=full"]
    )
    assert (config.trainer.global_batch_size, config.parallel.activation_checkpointing) == (
        4,
        "full",
    )
    several = dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, num_processes=2),
        trainer=dataclasses.replace(config.trainer, micro_batch_size=1),
    )
    path = tmp_path / "several.yaml"
    path.write_text(to_yaml(several), encoding="utf-8")
    # What one of the two processes does.
    assert run_config(BenchTrainConfig(workload=str(path))).trainer.global_batch_size == 2


def test_a_batch_is_whole_rows_of_the_vocabulary() -> None:
    config = joint("S")
    batch = random_batch(config)
    assert batch.tokens.shape == (8, 256)
    assert batch.loss_mask.all()
    assert 0 <= batch.tokens.min() < batch.tokens.max() < config.vocab_size


def test_no_matrix_is_left_at_zero_and_activations_stay_near_one() -> None:
    dit = tiny_dit()
    for parameter in dit.parameters():
        parameter.data.zero_()
    randomize(dit)
    assert all(parameter.abs().min() > 0 for parameter in dit.parameters() if parameter.ndim > 1)
    assert all(
        parameter.eq(float(name.endswith(".weight"))).all()
        for name, parameter in dit.named_parameters()
        if parameter.ndim == 1
    )
    weight = dit.blocks[0].get_parameter("mlp.proj_in.weight")
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)


def test_a_sampled_workload_has_the_trained_ones_networks() -> None:
    model = checkpoint(BenchSampleConfig(workload="S"), torch.device("cpu"))
    run = joint("S")
    assert isinstance(model, ColaCheckpoint)
    assert model.dit is not None
    assert (model.vae.config, model.dit.config, model.tokenizer.vocab_size) == (
        run.vae,
        run.dit,
        1024,
    )


def test_dotted_settings_are_the_runs() -> None:
    assert split_settings(
        ["workload=a.yaml", "rows=2", "trainer.precision=bf16", "my.bench.yaml"]
    ) == (["workload=a.yaml", "rows=2", "my.bench.yaml"], ["trainer.precision=bf16"])


@pytest.mark.parametrize(
    "config_class, setting, message",
    [
        (BenchTrainConfig, "rows=0", "rows must be at least 1 or null, not 0"),
        (BenchTrainConfig, "runs=0", "runs must be at least 1, not 0"),
        (
            BenchTrainConfig,
            "warmups=0",
            "warmups must be at least 1 (a first run does work that later ones do not), not 0",
        ),
        (BenchSampleConfig, "batch=0", "batch must be at least 1, not 0"),
        (BenchSampleConfig, "prompt_tokens=0", "prompt_tokens must be at least 1, not 0"),
        (BenchSampleConfig, "sampler.eos_token_ids=[3]", "sampler.eos_token_ids must be []"),
        (
            BenchSampleConfig,
            "sampler.batch_size=3",
            "sampler.batch_size is `batch` here; give batch=3",
        ),
        (
            BenchGrowthConfig,
            "lengths=[64,32]",
            "lengths must be numbers from 1 on, each larger than the one before, not [64, 32]",
        ),
        (
            BenchQualityConfig,
            "reference_steps=32",
            "reference_steps (32) must be more than any of steps",
        ),
        (BenchQualityConfig, "steps=[0]", "steps must be numbers from 1 on, not [0]"),
        (BenchQualityConfig, "solvers=[]", "solvers must be at least one, not []"),
        (BenchQualityConfig, "num_prompts=0", "num_prompts must be at least 1, not 0"),
    ],
)
def test_settings_that_measure_nothing_are_refused(
    config_class: type, setting: str, message: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_config(config_class, None, [setting])
    assert message in str(refused.value)


def test_unknown_workloads_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no workload 'MM'.*did you mean 'M'"):
        run_config(BenchTrainConfig(workload="MM"))
    with pytest.raises(UserError, match=r"There is no config file none\.yaml"):
        run_config(BenchTrainConfig(workload="none.yaml"))
    with pytest.raises(UserError, match=r"There is no workload 'papers'.*did you mean 'paper'"):
        checkpoint(BenchSampleConfig(workload="papers"), torch.device("cpu"))
    (tiny_folder / "cola_dlm" / "cola_dit").rename(tmp_path / "cola_dit")
    try:
        with pytest.raises(
            UserError,
            match=(
                r"is a checkpoint of `cola-train vae`, which writes no text; give one of stage 2"
            ),
        ):
            checkpoint(BenchSampleConfig(workload=str(tiny_folder)), torch.device("cpu"))
    finally:
        (tmp_path / "cola_dit").rename(tiny_folder / "cola_dlm" / "cola_dit")
    assert set(workloads()) == {"S", "M", "paper_stage1", "paper_stage2"}

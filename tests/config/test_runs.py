"""Which settings make a run what it is, and which may change when it goes on."""

from pathlib import Path

import pytest

from cola_train.config.load import load_config
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig
from cola_train.families.registry import families, load_run_config

BASE = [
    "name=x",
    "data.path=here",
    "vae.block_size=1",
    "trainer.global_batch_size=16",
    "objective.reference_weight=0",
]


def joint(*overrides: str) -> JointRunConfig:
    return load_config(JointRunConfig, None, [*BASE, *overrides])


@pytest.mark.parametrize(
    "override",
    [
        "parallel.strategy=ddp",
        "parallel.num_processes=2",
        "parallel.timeout_seconds=5",
        "parallel.activation_checkpointing=full",
        "checkpoint.every_steps=7",
        "budget.marks=[3]",
        "budget.eflops=3",
        "checkpoint.if_damaged=previous",
        "guard.max_skipped_in_a_row=9",
        "wandb.enabled=true",
        "runs_folder=elsewhere",
        "data.path=there",
        "data.num_workers=2",
        "trainer.max_steps=3",
        "trainer.micro_batch_size=4",
        "trainer.accelerator=cpu",
        "trainer.validate_every_steps=5",
        "trainer.log_every_steps=2",
        "trainer.sample_every_steps=2",
        "trainer.precision=auto",
    ],
)
def test_what_may_change(override: str) -> None:
    assert joint().differences(joint(override)) == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1", "seed: 66, now 1"),
        ("data_seed=1", "data_seed: 6198, now 1"),
        ("trainer.global_batch_size=32", "trainer.global_batch_size: 16, now 32"),
        ("trainer.precision=fp32", "trainer.precision: 'bf16', now 'fp32'"),
        ("optim.learning_rate=1e-3", "optim.learning_rate: 0.00015, now 0.001"),
        ("dit.num_layers=3", "dit.num_layers: 24, now 3"),
        ("objective.flow.time_loc=0.5", "objective.flow.time_loc: 1.0, now 0.5"),
        ("init_vae_from=there", "init_vae_from: None, now 'there'"),
    ],
)
def test_what_makes_another_run(override: str, named: str) -> None:
    assert joint().differences(joint(override)) == [named]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("parallel.num_processes=0", "parallel.num_processes must be at least 1, not 0"),
        (
            "parallel.timeout_seconds=0",
            r"parallel.timeout_seconds must be in \[1, 31536000\] \(a year\), not 0",
        ),
        ("parallel.num_processes=3", r"\(8 x 3 = 24\)"),
        ("checkpoint.keep=0", "checkpoint.keep must be at least 1, not 0"),
        ("budget.marks=[0]", "budget.marks must be above 0, not '0'"),
        ("guard.spike_deviations=0", "guard.spike_deviations must be above 0 or null, not 0"),
        ("guard.spike_window=9", "guard.spike_window must be at least 10, not 9"),
        ("guard.max_skipped_in_a_row=0", "guard.max_skipped_in_a_row must be at least 1, not 0"),
    ],
)
def test_what_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        joint(override)


def test_every_config_in_the_folder_can_go_on_with_itself() -> None:
    for path in (Path(__file__).parents[2] / "configs").glob("paper/*.yaml"):
        config = load_run_config(path)
        assert config.differences(config) == []
        assert families()[path.stem].config is type(config)


def test_a_baselines_file_must_say_which(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\ntransformer: {hidden_size: 8}\n", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"x.yaml must say what it is for as `stage:`, one of vae, joint, distill, ar, "
        r"llada\.",
    ):
        load_run_config(path)
    path.write_text("name: x\nstage: gan\n", encoding="utf-8")
    with pytest.raises(
        UserError,
        match="says `stage: gan`, and there is no such family; there are vae, joint, distill, ar, "
        "llada",
    ):
        load_run_config(path)

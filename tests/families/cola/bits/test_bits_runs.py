"""Runs that begin with bits: they learn, resume, are exported as released; and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_train.config.load import load_config
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import DistillRunConfig, JointRunConfig
from cola_train.families.generate import generate
from cola_train.run_layout import EXPORT, folder_of
from cola_train.training.run import train
from tests.helpers.runs import figures, saved_tensors

BITS = [
    "init_as=bits",
    "objective.reference_weight=0",
    "objective.fixed_log_snr=2.75",
    "objective.vae_strategy.mode=fix",
    "objective.mask_weight=0",
    "vae.dim=32",
    "vae.latent_dim=20",
    "dit.txt_in_channels=20",
    "dit.txt_out_channels=20",
    "dit.txt_dim=48",
    "dit.emb_dim=48",
    "dit.block_size=1",
]


def test_a_run_that_begins_with_bits_learns_resumes_and_is_exported_as_released(
    joint_config: Callable[..., JointRunConfig],
) -> None:
    longer = [*BITS, "trainer.max_steps=24", "optim.decay=100", "optim.learning_rate=3e-4"]
    train(joint_config("whole", *longer))
    train(joint_config("parts", *longer, "trainer.max_steps=9"))
    train(joint_config("parts", *longer))
    whole, parts = (folder_of(joint_config(name, *longer)) for name in ("whole", "parts"))
    ends = saved_tensors(whole), saved_tensors(parts)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    measured = figures(whole)
    assert measured == figures(parts)
    # The written VAE keeps every token; the DiT learns from where it began.
    assert measured[24, "validation/reconstruction_accuracy"] > 0.99
    assert measured[24, "validation/flow_mse"] < measured[3, "validation/flow_mse"]
    assert (whole / EXPORT / "cola_dlm" / "cola_dit" / "config.json").is_file()
    checkpoint = ColaCheckpoint.load(whole)
    assert checkpoint.dit is not None
    assert checkpoint.dit.codebook is None
    written = generate(
        checkpoint,
        [checkpoint.tokenizer.encode("It was")],
        SamplerConfig(max_new_tokens=4, num_steps=4),
    )
    assert len(written[0].token_ids) > 0


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("init_vae_from=checkpoints/x", "leave init_vae_from and init_dit_from out"),
        ("init_dit_from=checkpoints/x", "leave init_vae_from and init_dit_from out"),
        ("objective.fixed_log_snr=null", "needs objective.fixed_log_snr"),
        ("vae.latent_dim=16,16", "320 tokens need 9 bits: set vae.latent_dim"),
        ("vae.latent_dim=21,21", "an even number from 18 on, not 21"),
        ("vae.dim=16", r"vae.dim \(16\) of at least vae.latent_dim \(20\)"),
        ("dit.txt_dim=40,40", "dit.txt_dim of at least 42 and 20 hidden units"),
        ("vae.patch_size=2", "needs vae.patch_size=1, not 2"),
    ],
)
def test_what_bits_need_is_told_before_anything_is_read(
    joint_config: Callable[..., JointRunConfig], setting: str, told: str
) -> None:
    name, _, values = setting.partition("=")
    first, _, second = values.partition(",")
    changes = [f"{name}={first}"]
    if name == "vae.latent_dim":
        changes += [f"dit.txt_in_channels={second}", f"dit.txt_out_channels={second}"]
    if name == "dit.txt_dim":
        changes += [f"dit.emb_dim={second}"]
    with pytest.raises(UserError, match=told):
        joint_config("refused", *BITS, *changes)


def test_a_codebook_is_refused(joint_config: Callable[..., JointRunConfig]) -> None:
    codebook = ["dit.head=codebook", "dit.vocab_size=320"]
    with pytest.raises(UserError, match=r"leave dit\.head=codebook out"):
        joint_config("refused", *BITS, *codebook)


def test_a_teachers_vae_is_not_written_over() -> None:
    settings = ["init_as=bits", "teacher_from=checkpoints/x", "data.path=rows", "name=taught"]
    with pytest.raises(UserError, match="leave init_as=bits out"):
        load_config(DistillRunConfig, None, settings)


def test_bits_are_of_the_runs_own_rows(
    joint_config: Callable[..., JointRunConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="nothing-here"):
        train(joint_config("lost", *BITS, f"data.path={tmp_path / 'nothing-here'}"))

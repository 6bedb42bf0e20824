"""What training logs of held-out rows against what the checkpoint that it exports makes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.cola.losses import FlowConfig
from cola_train.run_layout import folder_of
from cola_train.training.run import train
from tests.helpers.held_out import held_out_flow, reconstruction_accuracy


def test_figures_of_the_export_equal_those_that_training_logged(
    vae_config: Callable[..., VAERunConfig],
    joint_config: Callable[..., JointRunConfig],
    prepared_folder: Path,
) -> None:
    vae = vae_config("vae", "trainer.max_steps=3")
    train(vae)
    joint = joint_config(
        "joint",
        f"init_vae_from={folder_of(vae)}",
        "trainer.max_steps=3",
        "trainer.validation_rows=1000",
    )
    train(joint)
    lines = [
        json.loads(line) for line in (folder_of(joint) / "metrics.jsonl").read_text().splitlines()
    ]
    logged = next(line for line in reversed(lines) if "validation/flow_mse" in line)
    data, checkpoint = PreparedData.open(prepared_folder), ColaCheckpoint.load(folder_of(joint))
    num_rows = data.num_rows(VALIDATION)
    flow = held_out_flow(checkpoint, data, num_rows, FlowConfig(), 66)
    assert flow.loss == pytest.approx(logged["validation/flow_mse"], rel=1e-5)
    accuracy = reconstruction_accuracy(checkpoint, data, num_rows, 66)
    assert accuracy == pytest.approx(logged["validation/reconstruction_accuracy"], abs=1e-6)

"""The page of results: its figures against those the run logged, and against what can be computed by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cola_train.evaluation.writing.report import held_out_openings, training_texts, write_report
from cola_train.families.cola.inspection.held_out import held_out_flow, reconstruction_accuracy

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import FlowConfig, JointRunConfig, VAERunConfig
from cola_train.flow import mean_variance_bound
from cola_train.models.initialize import initialise_dit
from cola_train.run_layout import folder_of
from cola_train.training.run import train


@pytest.fixture
def runs(vae_config: Callable[..., VAERunConfig], joint_config: Callable[..., JointRunConfig]) -> tuple[Path, Path]:
    vae = vae_config("vae", "trainer.max_steps=3")
    train(vae)
    vae_run = folder_of(vae)
    joint = joint_config("joint", f"init_vae_from={vae_run}", "trainer.max_steps=3", "trainer.validation_rows=1000")
    train(joint)
    return vae_run, folder_of(joint)


def test_figures_of_the_export_equal_those_that_training_logged(runs: tuple[Path, Path], prepared_folder: Path) -> None:
    lines = [json.loads(line) for line in (runs[1] / "metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in reversed(lines) if "validation/flow_mse" in line)
    data, checkpoint = PreparedData.open(prepared_folder), ColaCheckpoint.load(runs[1])
    num_rows = data.num_rows(VALIDATION)
    assert held_out_flow(checkpoint, data, num_rows, FlowConfig(), 66).loss == pytest.approx(
        logged["validation/flow_mse"], rel=1e-5
    )
    accuracy = reconstruction_accuracy(checkpoint, data, num_rows, 66)
    assert accuracy == pytest.approx(logged["validation/reconstruction_accuracy"], abs=1e-6)


def test_an_untrained_dit_predicts_no_velocity_and_loses_to_the_bound(runs: tuple[Path, Path], prepared_folder: Path) -> None:
    checkpoint, data = ColaCheckpoint.load(runs[1]), PreparedData.open(prepared_folder)
    assert checkpoint.dit is not None
    initialise_dit(checkpoint.dit, 0)
    flow = held_out_flow(checkpoint, data, 40, FlowConfig(), 66)
    tokens = torch.stack([torch.from_numpy(data.row(VALIDATION, row)[0]) for row in range(40)])
    posterior = checkpoint.vae.encode(tokens)
    # Without a prediction the error is E[u^2] = 1 + E[mu^2] + E[sigma^2].
    expected = 1 + posterior.mean.square().mean() + posterior.logvar.exp().mean()
    assert flow.loss == pytest.approx(float(expected), rel=0.05)
    assert flow.bound < flow.loss
    variance = (posterior.mean.flatten(0, 1).var(0) + posterior.logvar.exp().flatten(0, 1).mean(0)).detach()
    times = torch.sigmoid(1 + torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    # 40 rows have 40 times: the two agree as far as so few draws can.
    assert flow.bound == pytest.approx(mean_variance_bound(variance, times), rel=0.1)


def test_the_page_says_what_it_should_and_lies_in_the_run_folder(runs: tuple[Path, Path]) -> None:
    page = write_report(*runs, SamplerConfig(max_new_tokens=8))
    assert (runs[1] / "report.md").read_text(encoding="utf-8") == page
    for part in ("Reconstruction accuracy: ", "Flow-matching loss: ", "Known words: ", "s^2 / ((1 - t)^2 s^2 + t^2)", "losses.png"):
        assert part in page
    assert page.count(" | ") == 3


def test_openings_and_what_really_follows_are_neighbours_in_held_out_rows(prepared_folder: Path) -> None:
    data = PreparedData.open(prepared_folder)
    openings, endings = held_out_openings(data, 5, 8)
    rows = [data.row(VALIDATION, row)[0].tolist() for row in range(data.num_rows(VALIDATION))]
    for opening, ending in zip(openings, endings, strict=True):
        (row,) = [row for row in rows if row[: len(opening)] == opening]
        assert data.tokenizer.decode(row[len(opening) : len(opening) + 8]) == ending


def test_training_text_is_whole(prepared_folder: Path) -> None:
    data = PreparedData.open(prepared_folder)
    (text,) = training_texts(data)
    assert "It is a truth universally" in text or len(text) > 10_000


def test_a_vae_alone_has_no_flow(runs: tuple[Path, Path], prepared_folder: Path) -> None:
    with pytest.raises(UserError, match="needs a checkpoint with a DiT"):
        held_out_flow(ColaCheckpoint.load(runs[0]), PreparedData.open(prepared_folder), 4, FlowConfig(), 66)

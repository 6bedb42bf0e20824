"""Stage 2 with a codebook: codes are measured; it trains, resumes and is exported on its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_train.config.load import load_config
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import TRAIN
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import DistillRunConfig, JointRunConfig, VAERunConfig
from cola_train.families.cola.losses import Stage2Config, VAEStrategyConfig
from cola_train.families.cola.stage2 import Stage2Objective
from cola_train.families.generate import generate
from cola_train.families.registry import load_checkpoint
from cola_train.objectives.objective import weights_of
from cola_train.run_layout import EXPORT, folder_of
from cola_train.training.run import train
from tests.helpers.compare import assert_near
from tests.helpers.runs import SMALL, SMALL_DIT, figures, saved_tensors
from tests.helpers.tiny import make_batch, random_tokens, tiny_dit, tiny_vae

CODEBOOK = [
    "dit.head=codebook",
    "dit.vocab_size=320",
    "dit.embeds_codes=true",
    "objective.vae_strategy.mode=fix",
]


def codebook_config(
    vae_config: Callable[..., VAERunConfig], joint_config: Callable[..., JointRunConfig]
) -> Callable[..., JointRunConfig]:
    """A stage 1 of one step, and what makes configs of runs that start from it."""
    stage1 = vae_config("stage1", "trainer.max_steps=1")
    train(stage1)
    settings = [*CODEBOOK, f"init_vae_from={folder_of(stage1)}"]
    return lambda name, *more: joint_config(name, *settings, *more)


def test_a_run_with_a_codebook_resumes_and_is_exported_beside_the_released_layout(
    vae_config: Callable[..., VAERunConfig], joint_config: Callable[..., JointRunConfig]
) -> None:
    make = codebook_config(vae_config, joint_config)
    longer = ["trainer.max_steps=24", "optim.decay=100", "optim.learning_rate=0.02"]
    train(make("whole", *longer))
    train(make("parts", *longer, "trainer.max_steps=9"))
    train(make("parts", *longer))
    whole, parts = folder_of(make("whole")), folder_of(make("parts"))
    ends = saved_tensors(whole), saved_tensors(parts)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    measured = figures(whole)
    assert measured == figures(parts)
    # From what token frequencies know it learns more.
    assert measured[24, "validation/code_nats"] < measured[3, "validation/code_nats"]
    folder = whole / EXPORT / "cola_dlm"
    assert sorted(path.name for path in folder.iterdir()) == ["cola_codebook_dit", "cola_vae"]
    checkpoint = load_checkpoint(whole)
    assert checkpoint.family == "joint"
    (text,) = generate(checkpoint, ["It was"], SamplerConfig(num_steps=2, max_new_tokens=5))
    assert 1 <= len(text.token_ids) <= 5


def test_codes_are_measured_on_training_rows(
    vae_config: Callable[..., VAERunConfig],
    joint_config: Callable[..., JointRunConfig],
    prepared_folder: Path,
) -> None:
    make = codebook_config(vae_config, joint_config)
    run = make("measured", "trainer.max_steps=1", "objective.fixed_log_snr=2.0")
    train(run)
    checkpoint = ColaCheckpoint.load(folder_of(run))
    assert checkpoint.dit is not None
    codebook, data = checkpoint.dit.codebook, PreparedData.open(prepared_folder)
    assert codebook is not None
    rows = [torch.from_numpy(data.row(TRAIN, row)[0]) for row in range(data.num_rows(TRAIN))]
    tokens = torch.stack(rows)
    posterior = checkpoint.vae.encode(tokens)
    counts = tokens.flatten().bincount(minlength=320)
    commonest = int(counts.argmax())
    assert_near(codebook.codes[commonest], posterior.mean[tokens == commonest].mean(0), 1e-4)
    assert_near(codebook.log_p.exp(), (counts + 0.5) / (counts + 0.5).sum(), 1e-5)
    # Around its code a latent has at least the variance that the run fixes.
    assert (codebook.variance > 0.99 * posterior.logvar.exp().mean((0, 1))).all()


def test_a_codebook_needs_a_vae_that_rests(
    joint_config: Callable[..., JointRunConfig],
) -> None:
    settings = ["dit.head=codebook", "dit.vocab_size=320", "init_vae_from=stage1"]
    with pytest.raises(UserError, match=r"dit\.head=codebook needs .*vae_strategy\.mode=fix"):
        joint_config("run", *settings)


def test_a_teacher_is_learned_from_and_the_result_is_in_the_released_layout(
    vae_config: Callable[..., VAERunConfig],
    joint_config: Callable[..., JointRunConfig],
    prepared_folder: Path,
    tmp_path: Path,
) -> None:
    make = codebook_config(vae_config, joint_config)
    train(make("teacher"))
    teacher = folder_of(make("teacher"))
    places = [f"data.path={prepared_folder}", f"runs_folder={tmp_path}"]
    settings = [*SMALL, *SMALL_DIT, *places, "objective.vae_strategy.mode=fix"]
    settings += ["trainer.max_steps=24", "optim.decay=100", "optim.learning_rate=0.02"]

    def taught(name: str, *more: str) -> DistillRunConfig:
        own = [f"name={name}", f"teacher_from={teacher}", *more]
        return load_config(DistillRunConfig, None, [*settings, *own])

    train(taught("whole"))
    train(taught("parts", "trainer.max_steps=9"))
    train(taught("parts"))
    whole, parts = folder_of(taught("whole")), folder_of(taught("parts"))
    ends = saved_tensors(whole), saved_tensors(parts)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    measured = figures(whole)
    assert measured == figures(parts)
    assert measured[24, "validation/teacher_mse"] < 0.8 * measured[3, "validation/teacher_mse"]
    # It is no teacher's copy: what the data say is another figure.
    assert measured[24, "validation/flow_mse"] > measured[24, "validation/teacher_mse"]
    folder = whole / EXPORT / "cola_dlm"
    assert sorted(path.name for path in folder.iterdir()) == ["cola_dit", "cola_vae"]
    assert load_checkpoint(whole).family == "joint"
    vae = f"{EXPORT}/cola_dlm/cola_vae/model.safetensors"
    assert (whole / vae).read_bytes() == (teacher / vae).read_bytes()

    for more, message in (
        (
            ["dit.block_size=2"],
            r"teacher_from=.* has blocks of 4 latents, and dit\.block_size is 2",
        ),
        (
            ["vae.dim=32"],
            r"teacher_from=.* does not fit this run's config \(vae\.dim: checkpoint 16",
        ),
        ([f"teacher_from={folder}"], r"teacher_from=.* has no cola_dlm/cola_vae"),
    ):
        with pytest.raises(UserError, match=message):
            train(taught("refused", *more))


def test_a_teachers_own_velocity_is_no_loss() -> None:
    config = Stage2Config(vae_strategy=VAEStrategyConfig(mode="fix"))
    objective = Stage2Objective(tiny_vae(), tiny_dit(), config, 3, tiny_dit())
    batch = make_batch(random_tokens(2, 16, seed=5), [0, 0])
    terms, counts = objective(batch, step=0), objective.counts(batch)
    found = {term.key: float(term.share(counts).detach()) for term in terms}
    assert found["teacher_mse"] == 0
    assert found["flow_mse"] > 0.1
    assert set(weights_of(terms)) == {"teacher_mse"}

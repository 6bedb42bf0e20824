"""A small prepared corpus and small configs, so that whole trainings take seconds; and what a run
left, to compare.
"""

import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cola_train.config.data import CorpusConfig, PrepareConfig, TokenizerTrainConfig
from cola_train.config.load import load_config
from cola_train.data.prepare import prepare
from cola_train.data.tokenizer_training import train_tokenizer
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.registry import family_named
from cola_train.families.transformer.family import BaselineRunConfig
from cola_train.json_lines import read_log
from cola_train.run_layout import CLOCKS, METRICS
from cola_train.training.checkpoints.folder import intact_manifest, latest_checkpoint, step_folder
from cola_train.training.checkpoints.tensors import CheckpointReader

BOOK = Path(__file__).resolve().parents[2] / "cola_train" / "data" / "austen.txt.xz"

SMALL = [
    "data.seq_len=32",
    "vae.vocab_size=320",
    "vae.dim=16",
    "vae.ffn_dim=32",
    "vae.num_heads=2",
    "vae.latent_dim=8",
    "vae.encoder_num_blocks=1",
    "vae.decoder_num_blocks=1",
    "vae.block_size=1",
    "optim.learning_rate=3e-3",
    "optim.warmup=2",
    "optim.decay=20",
    "trainer.precision=fp32",
    "trainer.accelerator=cpu",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=4",
    "trainer.validation_rows=5",
    "trainer.log_every_steps=1",
    "trainer.max_steps=6",
    "checkpoint.every_steps=3",
    "trainer.validate_every_steps=3",
]
SMALL_DIT = [
    "dit.txt_dim=16",
    "dit.emb_dim=16",
    "dit.heads=2",
    "dit.head_dim=8",
    "dit.rope_dim=4",
    "dit.num_layers=1",
    "dit.block_size=4",
    "dit.txt_in_channels=8",
    "dit.txt_out_channels=8",
]
SMALL_TRANSFORMER = [
    "transformer.vocab_size=320",
    "transformer.hidden_size=16",
    "transformer.intermediate_size=32",
    "transformer.num_attention_heads=2",
    "transformer.head_dim=8",
    "transformer.num_hidden_layers=1",
]


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first pages of a real novel, as rows of 32 tokens of a BPE of its own."""
    return prepare_small(tmp_path_factory.mktemp("data"))


def prepare_small(folder: Path) -> Path:
    """Prepare the first pages of a real novel in `folder`; returns where the rows lie."""
    book = folder / "book.txt"
    book.write_bytes(lzma.decompress(BOOK.read_bytes())[:60_000].rsplit(b"\n", 1)[0])
    corpus = CorpusConfig(inputs=[str(book)])
    train_tokenizer(
        TokenizerTrainConfig(out=str(folder / "tokenizer.json"), corpus=corpus, vocab_size=320)
    )
    prepare(
        PrepareConfig(
            out=str(folder / "rows"),
            tokenizer=str(folder / "tokenizer.json"),
            corpus=corpus,
            seq_len=32,
            held_out_share=0.1,
        )
    )
    return folder / "rows"


@pytest.fixture
def vae_config(prepared_folder: Path, tmp_path: Path) -> Callable[..., VAERunConfig]:
    """Make a small stage-1 config with overrides."""

    def make(name: str, *overrides: str) -> VAERunConfig:
        places = [f"name={name}", f"data.path={prepared_folder}", f"runs_folder={tmp_path}"]
        return load_config(VAERunConfig, None, [*SMALL, *places, *overrides])

    return make


@pytest.fixture
def joint_config(prepared_folder: Path, tmp_path: Path) -> Callable[..., JointRunConfig]:
    """Make a small stage-2 config, All Scratch unless overridden."""

    def make(name: str, *overrides: str) -> JointRunConfig:
        places = [
            f"name={name}",
            f"data.path={prepared_folder}",
            f"runs_folder={tmp_path}",
            "objective.reference_weight=0",
        ]
        return load_config(JointRunConfig, None, [*SMALL, *SMALL_DIT, *places, *overrides])

    return make


@pytest.fixture
def baseline_config(prepared_folder: Path, tmp_path: Path) -> Callable[..., BaselineRunConfig]:
    """Make a small config of a baseline, "ar" or "llada"."""

    def make(stage: str, name: str, *overrides: str) -> BaselineRunConfig:
        places = [f"name={name}", f"data.path={prepared_folder}", f"runs_folder={tmp_path}"]
        shared = [setting for setting in SMALL if not setting.startswith("vae.")]
        return load_config(
            family_named(stage).config, None, [*shared, *SMALL_TRANSFORMER, *places, *overrides]
        )

    return make


def figures(run: Path) -> dict[tuple[int, str], float | None]:
    """Every figure of metrics.jsonl but clock readings, by step and name; of a step that was done
    again, the last.
    """
    found = {}
    for row in read_log(run / METRICS):
        for name, value in row.items():
            if name not in CLOCKS | {"step"}:
                found[row["step"], name] = value
    return found


def saved_tensors(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every tensor of a run's checkpoint: of a step, or of the latest."""
    folder = latest_checkpoint(run) if step is None else step_folder(run, step)
    assert folder is not None
    manifest = intact_manifest(folder)
    tensors = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
    CheckpointReader(folder, manifest, one_process=True).load(tensors)
    return tensors

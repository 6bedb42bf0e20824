"""A run's checkpoint in the layout it ships in, tensor by tensor, on one process."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cola_train.config.run import RunConfig
from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.family import TrainedRun
from cola_train.families.registry import family_of
from cola_train.run_layout import MARKS
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES
from cola_train.training.checkpoints.folder import (
    CheckpointManifest,
    read_manifest,
    saved_steps,
    step_folder,
)
from cola_train.training.checkpoints.tensors import CheckpointReader
from cola_train.training.loop.state import EMA_PREFIX, MODEL


class SavedWeights(Mapping[str, Tensor]):
    """The objective's weights in a checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path, manifest: CheckpointManifest, use_ema: bool) -> None:
        """With `use_ema` the moving average of those that have one (frozen weights have none)."""
        self._shapes = manifest.shapes
        self._reader = CheckpointReader(folder, manifest, one_process=True)
        self._saved_as = {}
        for saved in manifest.shapes:
            kind, _, name = saved.partition(".")
            if kind == MODEL:
                average = f"{EMA_PREFIX}.{name}"
                self._saved_as[name] = average if use_ema and average in manifest.shapes else saved

    def __getitem__(self, name: str) -> Tensor:
        saved = self._saved_as[name]
        tensors = {saved: torch.empty(self._shapes[saved])}
        self._reader.load(tensors)
        return tensors[saved]

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved_as)

    def __len__(self) -> int:
        return len(self._saved_as)


def trained_run(
    config: RunConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, step: int
) -> TrainedRun[RunConfig]:
    """What a run is to its family after `step` steps, with what an export says of it beside."""
    facts = {
        "stage": config.stage,
        "step": step,
        "seq_len": config.data.seq_len,
        "run": config.name,
        "mask_documents": config.masks_documents,
    }
    return TrainedRun(config, weights, tokenizer, facts)


def export_checkpoint(
    config: RunConfig,
    folder: Path,
    tokenizer: Tokenizer,
    target: Path,
    *,
    use_ema: bool,
    replace: bool,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a run's checkpoint `folder` in its family's layout; memory holds one file at a time.

    Raises:
        UserError: a damaged checkpoint, no average where one is asked for, or a `target` that
            exists and is not to be replaced.
    """
    manifest = read_manifest(folder)
    require(
        not use_ema or any(name.startswith(f"{EMA_PREFIX}.") for name in manifest.shapes),
        f"{folder} has no moving average of the weights; only a run with ema.decay above 0 has "
        "one.",
    )
    weights = SavedWeights(folder, manifest, use_ema)
    run = trained_run(config, weights, tokenizer, manifest.step)
    family_of(config).write(target, run, replace=replace, max_shard_bytes=max_shard_bytes)


def export_marks(config: RunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
    """Write each checkpoint that is a mark (budget.marks) to RUN/marks/step-N, if not done yet."""
    for step in saved_steps(run_folder):
        folder = step_folder(run_folder, step)
        target = run_folder / MARKS / folder.name
        if not target.exists() and read_manifest(folder).mark:
            export_checkpoint(
                config, folder, tokenizer, target, use_ema=config.ema.export, replace=False
            )

"""What a run saves, when, and how it is found again: lightning/step-N, whole or absent, and the `latest` pointer."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader

from cola_train.config.settings import UserError
from cola_train.files import write_atomically

_FOLDER, _LATEST = "lightning", "latest"


def step_folder(run_folder: Path, step: int) -> Path:
    """The checkpoint folder of an optimizer step."""
    return run_folder / _FOLDER / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step that a checkpoint folder is of."""
    return int(folder.name.removeprefix("step-"))


def saved_steps(run_folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folders = (run_folder / _FOLDER).glob("step-*") if (run_folder / _FOLDER).is_dir() else []
    return sorted(int(match[1]) for folder in folders if (match := re.fullmatch(r"step-(\d+)", folder.name)))


def latest_checkpoint(run_folder: Path) -> Path:
    """The checkpoint that `latest` names.

    Raises:
        UserError: the run has no checkpoint, or the pointer names one that is not there.
    """
    pointer = run_folder / _FOLDER / _LATEST
    steps = saved_steps(run_folder)
    if not pointer.is_file():
        listed = f"it has steps {steps} but no `latest` file naming one" if steps else "it has no checkpoint yet"
        raise UserError(f"Cannot resume {run_folder}: {listed}. Start a new run under another name.")
    folder = run_folder / _FOLDER / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise UserError(f"Cannot resume {run_folder}: {pointer} names {folder.name}, which is not there; steps present: {steps}.")
    return folder


class Checkpoints(pl.Callback):
    """Saves every `every_steps` and at the last step, keeps the newest `keep`."""

    def __init__(self, run_folder: Path, every_steps: int, keep: int, max_steps: int) -> None:
        self.run_folder, self.every_steps, self.keep, self.max_steps = run_folder, every_steps, keep, max_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is time; a batch is an optimizer step."""
        step = trainer.global_step
        if step % self.every_steps and step != self.max_steps:
            return
        folder = step_folder(self.run_folder, step)
        if not folder.exists():
            trainer.save_checkpoint(folder)
        if trainer.is_global_zero:
            write_atomically(folder.parent / _LATEST, folder.name + "\n")
            for old in saved_steps(self.run_folder)[: -self.keep]:
                shutil.rmtree(step_folder(self.run_folder, old), ignore_errors=True)


def read_weights(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fill `wanted` (full tensors by their name in the stage module) from a sharded checkpoint, in one process.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to load in a single process")
            state_dict_loader.load({"state_dict": wanted}, storage_reader=FileSystemReader(folder), no_dist=True)
    except Exception as error:  # the reader lets many kinds through: unpickling, missing keys, sizes, files
        reason = str(error).strip().split("\n", 1)[0]
        raise UserError(f"The checkpoint {folder} is damaged or of another model: {reason}. Use another step's.") from error

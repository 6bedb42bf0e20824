"""When a run saves, and that a save that fails costs nothing but itself."""

import dataclasses
import shutil
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.processes import local_part
from cola_train.run_layout import folder_of
from cola_train.training.checkpoints.export import export_marks
from cola_train.training.checkpoints.folder import (
    CheckpointManifest,
    begin,
    finish,
    remove_old,
    saved_steps,
    step_folder,
    working_folder,
)
from cola_train.training.checkpoints.tensors import Writing
from cola_train.training.data import RunData
from cola_train.training.loop.module import StageCallback, StageModule
from cola_train.training.loop.state import RunState


class Saver(StageCallback):
    """Saves every `checkpoint.every_steps`, at marks (and exports these), at the end or a stop.

    Comes after the callback that validates: what is saved at a step has been validated at it.
    """

    def __init__(self, stage: StageModule, data: RunData, validates: bool) -> None:
        self.config, self.processes = stage.config, stage.processes
        self.run_folder, self.data, self.validates = folder_of(stage.config), data, validates
        self.group: dist.ProcessGroup  # of `setup`
        # A save: the manifest, without files, and what writes these.
        self._under_way: tuple[CheckpointManifest, Writing] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Here the watchdog sees it, should another process never come. Background writing
        # communicates at its own pace: it needs a group that nothing else uses.
        self.group = dist.new_group(backend="gloo")

    def after_step(self, stage: StageModule) -> None:
        config, step = self.config.checkpoint, stage.state.step
        if self._under_way is not None and stage.all_have_written:
            self._conclude(*self._under_way)
        last, mark = stage.is_done, stage.budget.at_mark(stage.state)
        if not (last or mark or step % config.every_steps == 0):
            return
        stage.watchdog.beat(f"saving the checkpoint of step {step}")
        problem = self._save(stage, mark, in_background=config.asynchronous and not (last or mark))
        if mark and problem is None:
            stage.watchdog.beat(f"exporting the checkpoint of step {step}")
            tokenizer = self.data.prepared.tokenizer
            unwritten = self._on_first(
                lambda: export_marks(self.config, self.run_folder, tokenizer)
            )
            if unwritten is not None:
                self._warn(
                    f"the mark at step {step} was not exported: {unwritten}. It is tried again "
                    "later."
                )
        if last and problem is not None:
            steps = saved_steps(self.run_folder)
            kept = f"The checkpoint of step {steps[-1]} is intact. " if steps else ""
            raise UserError(
                f"The run ended at step {step} but that step could not be saved: {problem}. {kept}"
                "Mend that (free space, permissions) and run the same command again to go on from "
                "there."
            )

    def on_exception(self, *_: Any) -> None:
        # No half-written folder is left where the run ends with all processes still there.
        writing = None if self._under_way is None else self._under_way[1]
        if writing is not None and writing.done and self.processes.is_first:
            shutil.rmtree(writing.folder, ignore_errors=True)

    def _save(self, stage: StageModule, mark: bool, in_background: bool) -> str | None:
        """Save now, or start to; returns what went wrong, the same on every process."""
        if self._under_way is not None:
            self._conclude(*self._under_way)
        state = stage.state
        if step_folder(self.run_folder, state.step).exists():
            return None  # the run resumed from this very step
        stage.objective.reshard()  # type: ignore[operator]  # FSDP's: no gathered copies are saved
        tensors = stage.saved_tensors()
        parts = [local_part(tensor) for tensor in tensors.values() if tensor.is_floating_point()]
        finite = all(bool(torch.isfinite(part).all()) for part in parts)
        if not all(self._gathered(finite)):
            return self._failed(state.step, "its weights or moments are not finite")
        manifest = CheckpointManifest(
            step=state.step,
            state=RunState.from_json(state.to_json()),
            data_sha256=self.data.sha256,
            world_size=self.processes.world_size,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            files={},
            good=not self.validates or state.validated_step == state.step,
            mark=mark,
        )
        problem = self._on_first(lambda: self._begin(stage))
        if problem is not None:
            return self._failed(state.step, problem)
        folder = working_folder(self.run_folder, state.step)
        writing = Writing(tensors, folder, self.group, in_background)
        self._under_way = manifest, writing
        stage.written = lambda: self._under_way is not None and writing.done
        return None if in_background else self._conclude(manifest, writing)

    def _begin(self, stage: StageModule) -> None:
        # Who resumes here does not log again what came before: it has to be on disk.
        for log in stage.logs:
            log.sync()
        begin(self.run_folder, stage.state.step)

    def _conclude(self, manifest: CheckpointManifest, writing: Writing) -> str | None:
        """Wait for a save; on process 0 verify, name and point to it, and remove old ones."""
        parts = self._gathered(writing.result())
        self._under_way = None
        problem = next((text for _, text in parts if text is not None), None)
        if problem is None:
            files = {name: fact for facts, _ in parts for name, fact in facts.items()}
            whole = dataclasses.replace(manifest, files=files)
            problem = self._on_first(lambda: finish(self.run_folder, writing.folder, whole))
        if problem is not None:
            if self.processes.is_first:
                shutil.rmtree(writing.folder, ignore_errors=True)
            return self._failed(manifest.step, problem)
        self._on_first(lambda: remove_old(self.run_folder, self.config.checkpoint.keep))
        return None

    def _gathered(self, mine: Any) -> list[Any]:
        """What every process gives, by rank."""
        parts: list[Any] = [None] * self.processes.world_size
        dist.all_gather_object(parts, mine, group=self.group)
        return parts

    def _on_first(self, act: Callable[[], object]) -> str | None:
        """Do something to the disk on process 0; what went wrong is known to all."""
        problem: list[str | None] = [None]
        if self.processes.is_first:
            try:
                act()
            except UserError as error:
                problem = [str(error)]
            except OSError as error:
                problem = [error.strerror or str(error)]
        dist.broadcast_object_list(problem, src=0, group=self.group)
        return problem[0]

    def _failed(self, step: int, problem: str) -> str:
        kept = "there is no earlier checkpoint"
        if steps := saved_steps(self.run_folder):
            kept = f"the checkpoint of step {steps[-1]} is intact"
        self._warn(
            f"the checkpoint of step {step} was not saved: {problem}. Training goes on; {kept}."
        )
        return problem

    def _warn(self, text: str) -> None:
        if self.processes.is_first:
            say(f"cola-train: warning: {text}")

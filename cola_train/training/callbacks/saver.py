"""When a run saves, and that a save that fails costs nothing but itself."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.data.tokenizer import Tokenizer
from cola_train.processes import Processes
from cola_train.training.checkpoints.export import export_marks
from cola_train.training.checkpoints.folder import (
    Manifest,
    begin,
    finish,
    remove_old,
    saved_steps,
    step_folder,
)
from cola_train.training.checkpoints.tensors import Writing
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.state import RunState, all_finite


class Saver(pl.Callback):
    """Saves every `checkpoint.every_steps`, at `budget.marks`, at the last step and when the run is
    asked to stop; exports marks.

    Comes after the callback that validates: what is saved at a step has been validated at it.
    """

    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        processes: Processes,
        tokenizer: Tokenizer,
        data_sha256: str,
        validates: bool,
    ) -> None:
        self.config, self.run_folder, self.processes, self.tokenizer = (
            config,
            run_folder,
            processes,
            tokenizer,
        )
        self.data_sha256, self.validates = data_sha256, validates
        # Background writing communicates at its own pace: it needs a group that nothing else uses.
        self.group = dist.new_group(backend="gloo")
        self._writing: Writing | None = None
        self._manifest: Manifest | None = None

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Save where it is time; a batch is an optimizer step."""
        assert isinstance(pl_module, StageModule)
        config, step = self.config.checkpoint, pl_module.state.step
        if self._writing is not None and pl_module.all_have_written:
            self._conclude()
        last, mark = pl_module.is_done, pl_module.budget.at_mark(pl_module.state)
        if not (last or mark or step % config.every_steps == 0):
            return
        pl_module.watchdog.beat(f"saving the checkpoint of step {step}")
        problem = self._save(
            pl_module, mark, in_background=config.asynchronous and not (last or mark)
        )
        if mark and problem is None:
            pl_module.watchdog.beat(f"exporting the checkpoint of step {step}")
            unwritten = self._on_first(
                lambda: export_marks(self.config, self.run_folder, self.tokenizer)
            )
            if unwritten is not None and self.processes.is_first:
                say(
                    f"cola-train: warning: the mark at step {step} was not exported: {unwritten}. "
                    "It is tried again later."
                )
        if last and problem is not None:
            steps = saved_steps(self.run_folder)
            raise UserError(
                f"The run ended at step {step} but that step could not be saved: {problem}. "
                + (f"The checkpoint of step {steps[-1]} is intact. " if steps else "")
                + "Mend that (free space, permissions) and run the same command again to go on "
                "from there."
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave no half-written folder behind where the run ends with all processes still there."""
        if self._writing is not None and self._writing.done and self.processes.is_first:
            shutil.rmtree(self._working(), ignore_errors=True)

    def _save(self, module: StageModule, mark: bool, in_background: bool) -> str | None:
        """Save now, or start to; returns what went wrong, the same on every process."""
        if self._writing is not None:
            self._conclude()
        state = module.state
        if step_folder(self.run_folder, state.step).exists():
            return None  # the run went on from this very step
        module.objective.reshard()  # type: ignore[operator]  # FSDP's: no gathered copies are saved
        tensors = module.saved_tensors()
        if not self._all(all_finite(tensors)):
            return self._failed(state.step, "its weights or moments are not finite")
        self._manifest = Manifest(
            step=state.step,
            state=RunState.from_json(state.to_json()),
            data_sha256=self.data_sha256,
            world_size=self.processes.world_size,
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            files={},
            good=not self.validates or state.validated_step == state.step,
            mark=mark,
        )
        problem = self._on_first(lambda: begin(self.run_folder, state.step))
        if problem is not None:
            return self._failed(state.step, problem)
        for log in module.logs:
            log.sync()
        self._writing = Writing(tensors, self._working(), self.group, in_background)
        module.written = lambda: self._writing is not None and self._writing.done
        return None if in_background else self._conclude()

    def _conclude(self) -> str | None:
        """Wait for the save under way; verify, name and point to it, on process 0; remove old
        ones.
        """
        assert self._writing is not None
        assert self._manifest is not None
        parts: list[Any] = [None] * self.processes.world_size
        dist.all_gather_object(parts, self._writing.result(), group=self.group)
        self._writing = None
        problem = next((text for _, text in parts if text is not None), None)
        for facts, _ in parts:
            self._manifest.files.update(facts)
        if problem is None:
            manifest = self._manifest
            problem = self._on_first(lambda: finish(self.run_folder, self._working(), manifest))
        if problem is not None:
            if self.processes.is_first:
                shutil.rmtree(self._working(), ignore_errors=True)
            return self._failed(self._manifest.step, problem)
        self._on_first(lambda: remove_old(self.run_folder, self.config.checkpoint.keep))
        return None

    def _working(self) -> Path:
        assert self._manifest is not None
        final = step_folder(self.run_folder, self._manifest.step)
        return final.with_name(f".saving-{final.name}")

    def _all(self, mine: bool) -> bool:
        answers: list[Any] = [None] * self.processes.world_size
        dist.all_gather_object(answers, mine, group=self.group)
        return all(answers)

    def _on_first(self, act: Any) -> str | None:
        """Do something to the disk on process 0; what went wrong is known to all."""
        problem: list[str | None] = [None]
        if self.processes.is_first:
            try:
                act()
            except (OSError, UserError) as error:
                problem = [
                    error.strerror or str(error) if isinstance(error, OSError) else str(error)
                ]
        dist.broadcast_object_list(problem, src=0, group=self.group)
        return problem[0]

    def _failed(self, step: int, problem: str) -> str:
        if self.processes.is_first:
            steps = saved_steps(self.run_folder)
            kept = (
                f"the checkpoint of step {steps[-1]} is intact"
                if steps
                else "there is no earlier checkpoint"
            )
            say(
                f"cola-train: warning: the checkpoint of step {step} was not saved: {problem}. "
                f"Training goes on; {kept}."
            )
        return problem

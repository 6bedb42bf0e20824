"""The loop of a run in this process: its objective under Lightning's Trainer, with all that happens
around steps.

Importing Lightning takes seconds, most of it for metrics that nothing here uses. So only this
module and those that it brings together import it; `run.py` asks for this one when there is
something to train.
"""

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import TRAIN
from cola_train.families.registry import family_of
from cola_train.processes import Processes
from cola_train.run_folder import Status, write_status
from cola_train.run_layout import folder_of
from cola_train.training.callbacks.alarms import Alarms
from cola_train.training.callbacks.in_loop_evaluation import InLoopEvaluation
from cola_train.training.callbacks.metrics import Metrics, Progress, wandb_loggers
from cola_train.training.callbacks.samples import Samples
from cola_train.training.callbacks.saver import Saver
from cola_train.training.callbacks.start import Start
from cola_train.training.callbacks.validation import Validation
from cola_train.training.checkpoints.resume import Saved, intact_checkpoint
from cola_train.training.data import RunData
from cola_train.training.loop.guard import RunStoppedError
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.lightning import build_trainer
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.step_log import Attempt, StepLog
from cola_train.training.loop.watchdog import Watchdog
from cola_train.training.preflight import benchmark_samples


def fit(
    config: RunConfig,
    processes: Processes,
    stop: StopRequest,
    data: RunData,
    data_sha256: str,
    own: Saved | None,
) -> Status:
    """Train from the checkpoint `own`, or from the start without one, until the run is finished or
    asked to stop.

    Raises:
        UserError: another process of the run was lost, or one that reads data.
        RunStoppedError: too many steps in a row had to be skipped, or an alarm stopped the run.
    """
    tokenizer = data.prepared.tokenizer
    run_folder, first = folder_of(config), processes.is_first
    data.start_step = done = 0 if own is None else own[1].step
    warm = None
    if own is None and config.warm_start_from is not None:
        warm = intact_checkpoint(Path(config.warm_start_from), processes, "stop")
    watchdog = Watchdog(processes.rank, config.parallel.timeout_seconds)
    stage = StageModule(config, processes, stop, watchdog)
    metrics = Metrics(config, run_folder, first, wandb_loggers(config, run_folder) if first else [])
    logs = [metrics.lines]
    callbacks: list[pl.Callback] = [Start(config, own, warm), metrics, Progress(first)]
    if family_of(config).writes_text:
        samples = Samples(config, run_folder, tokenizer)
        logs.append(samples.lines)
        callbacks.append(samples)
    validates = config.trainer.validate_every_steps > 0 and data.num_validation_rows > 0
    if validates:
        callbacks.append(Validation(config, data, metrics.log_evaluation))
    alarms = Alarms(config, run_folder, first, metrics.log_evaluation)
    logs.append(alarms.lines)
    if config.in_loop_eval.is_on:
        samples_of = benchmark_samples(config.in_loop_eval)
        callbacks.append(
            InLoopEvaluation(
                config,
                data.prepared,
                samples_of,
                tokenizer,
                metrics.log_evaluation,
                alarms.see_inspection,
            )
        )
    callbacks += [
        alarms,
        Saver(config, run_folder, processes, tokenizer, data_sha256, validates),
        _End(),
    ]
    if first:
        write_status(run_folder, Status("running", done))
        attempt = Attempt(
            from_step=done,
            world_size=processes.world_size,
            strategy=config.parallel.strategy,
            micro_batch_size=config.trainer.micro_batch_size,
            global_batch_size=config.trainer.global_batch_size,
            num_rows=data.prepared.num_rows(TRAIN),
            seed=config.seed,
            data_seed=config.data_seed,
            data_sha256=data_sha256,
        )
        stage.step_log = StepLog(run_folder, attempt)
        stage.logs = [*logs, stage.step_log.lines]
    trainer = build_trainer(config, processes, callbacks)
    try:
        with watchdog:
            trainer.fit(
                stage, train_dataloaders=data.train_loader(processes.rank, processes.world_size)
            )
        if alarms.stopped_by is not None and not stage.budget.is_spent(stage.state):
            raise RunStoppedError(
                f"stopped by alarm (alarms.stop) and saved: {alarms.stopped_by} The same command "
                "again goes on from there; the alarm is not raised again before it was over."
            )
    except Exception as error:
        problem = _explained(error, processes, stage, watchdog.doing, config)
        if first:
            write_status(
                run_folder,
                Status(
                    "stopped" if isinstance(error, RunStoppedError) else "failed",
                    stage.state.step,
                    str(problem),
                ),
            )
        if problem is error:
            raise
        raise problem from error
    if stage.budget.is_spent(stage.state):
        return Status("finished", stage.state.step)
    return Status(
        "interrupted", stage.state.step, f"{stop.signal_name or 'a signal to another process'}"
    )


class _End(pl.Callback):
    """Ends the loop after the last step, or when asked to; comes last, when the step has been
    saved.
    """

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any
    ) -> None:
        """A batch is an optimizer step."""
        assert isinstance(pl_module, StageModule)
        trainer.should_stop = pl_module.is_done
        pl_module.watchdog.beat(f"reading the rows of step {pl_module.state.step + 1}")


def _explained(
    error: Exception, processes: Processes, stage: StageModule, doing: str, config: RunConfig
) -> Exception:
    """What ended a run, as one message where it was not our doing: a lost process, a dead data
    worker. Else the error itself.
    """
    if isinstance(error, UserError):
        return error
    rank, step = processes.rank, stage.state.step + 1
    # A reader's death interrupts the main thread wherever it is: others' errors may be wrapped
    # around that one.
    whole: BaseException = error
    while (
        "DataLoader worker" not in str(whole)
        and (inner := whole.__cause__ or whole.__context__) is not None
    ):
        whole = inner
    text = str(whole) if "DataLoader worker" in str(whole) else str(error)
    going_on = "The last checkpoint is intact; run the same command again to go on from it."
    if "DataLoader worker" in text:
        rows = config.trainer.global_batch_size
        first = (step - 1) * rows + rank * rows // processes.world_size
        # Of a failure in the reader its traceback is quoted: the error and its note come last.
        cause = "; ".join(text.strip().splitlines()[-2:])
        return UserError(
            f"Rank {rank}: a process that reads data died or failed while step {step} waited for "
            f"its rows, samples {first} to {first + rows // processes.world_size - 1} (and those "
            f"read ahead): {cause}. Lack of memory and a file that vanished are usual causes. "
            f"{going_on}"
        )
    if re.search(r"[Cc]onnection (closed|reset|refused)|gloo|NCCL|[Tt]imed out|Broken pipe", text):
        return UserError(
            f"Rank {rank} lost another process of the run while {doing} (step {step}): "
            f"{text.strip().splitlines()[0]}. The other ranks' messages say which ended first and "
            f"why. {going_on}"
        )
    error.add_note(f"on rank {rank}, while {doing} (step {step})")
    return error

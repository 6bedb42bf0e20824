"""A run's loop in this process: its objective under Lightning's Trainer, with its callbacks.

Importing Lightning takes seconds, most of it for metrics that nothing here uses. So only this
module and those that it brings together import it; `run.py` asks for this one when there is
something to train.
"""

import re
from pathlib import Path

import lightning.pytorch as pl

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import TRAIN
from cola_train.families.registry import family_of
from cola_train.processes import Processes
from cola_train.run_folder import Status, write_status
from cola_train.run_layout import folder_of
from cola_train.training.callbacks.alarms import Alarms
from cola_train.training.callbacks.in_loop_evaluation import InLoopEvaluation, Samples
from cola_train.training.callbacks.metrics import Metrics, Progress
from cola_train.training.callbacks.saver import Saver
from cola_train.training.callbacks.validation import Validation
from cola_train.training.checkpoints.resume import Saved, intact_checkpoint
from cola_train.training.checkpoints.tensors import CheckpointReader
from cola_train.training.data import RunData
from cola_train.training.loop.guard import RunStoppedError
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.lightning import build_trainer
from cola_train.training.loop.module import StageCallback, StageModule
from cola_train.training.loop.state import MODEL, RunState, fill
from cola_train.training.loop.step_log import Attempt, StepLog
from cola_train.training.parallel.sharding import gather_each_once
from cola_train.training.preflight import benchmark_samples


def fit(
    config: RunConfig, processes: Processes, stop: StopRequest, data: RunData, own: Saved | None
) -> Status:
    """Train from the checkpoint `own`, or from the start, until the run is finished or stopped.

    Raises:
        UserError: another process of the run was lost, or one that reads data.
        RunStoppedError: too many steps in a row had to be skipped, or an alarm stopped the run.
    """
    run_folder, first = folder_of(config), processes.is_first
    data.start_step = done = 0 if own is None else own[1].step
    warm = None
    if own is None and config.warm_start_from is not None:
        warm = intact_checkpoint(Path(config.warm_start_from), processes, "stop")
    stage = StageModule(config, processes, stop)
    metrics = Metrics(config, run_folder, first)
    alarms = Alarms(config, run_folder, first, metrics.log_evaluation)
    logs = [metrics.lines, alarms.lines]
    callbacks: list[pl.Callback] = [_Start(own, warm), metrics, Progress()]
    if family_of(config).writes_text:
        samples = Samples(run_folder, data.prepared.tokenizer)
        logs.append(samples.lines)
        callbacks.append(samples)
    validates = config.trainer.validate_every_steps > 0 and data.num_validation_rows > 0
    if validates:
        callbacks.append(Validation(data, metrics.log_evaluation))
    if config.in_loop_eval.is_on:
        evaluation, report = config.in_loop_eval, metrics.log_evaluation
        asked, see = benchmark_samples(evaluation), alarms.see_inspection
        callbacks.append(InLoopEvaluation(evaluation, data.prepared, asked, report, see))
    callbacks += [alarms, Saver(stage, data, validates), _End()]
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
            data_sha256=data.sha256,
        )
        stage.step_log = StepLog(run_folder, attempt)
        stage.logs = [*logs, stage.step_log.lines]
    trainer = build_trainer(config, processes, callbacks)
    try:
        with stage.watchdog:
            loader = data.train_loader(processes.rank, processes.world_size)
            trainer.fit(stage, train_dataloaders=loader)
        if alarms.stopped_by is not None and not stage.budget.is_spent(stage.state):
            raise RunStoppedError(
                f"stopped by alarm (alarms.stop) and saved: {alarms.stopped_by} The same command "
                "again goes on from there; the alarm is not raised again before it was over."
            )
    except Exception as error:
        problem = _explained(error, stage)
        if first:
            step, reason = stage.state.step, str(problem)
            stopped = isinstance(error, RunStoppedError)
            write_status(run_folder, Status("stopped" if stopped else "failed", step, reason))
        if problem is error:
            raise
        raise problem from error
    if stage.budget.is_spent(stage.state):
        return Status("finished", stage.state.step)
    reason = stop.signal_name or "a signal to another process"
    return Status("interrupted", stage.state.step, reason)


class _Start(pl.Callback):
    """Gives the sharded stage its values, once it has its optimizer; a collective call.

    They are those of the run's `own` checkpoint, or the weights alone of another run's, `warm`;
    without either they are the family's initial values.
    """

    def __init__(self, own: Saved | None, warm: Saved | None) -> None:
        self.own, self.warm = own, warm

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, StageModule)
        pl_module.watchdog.beat("reading or drawing the weights")
        config, objective = pl_module.config, pl_module.objective
        if self.own is not None:
            CheckpointReader(*self.own).load(pl_module.saved_tensors())
            pl_module.state = RunState.from_json(self.own[1].state.to_json())
        elif self.warm is not None:
            weights = {f"{MODEL}.{name}": value for name, value in objective.state_dict().items()}
            CheckpointReader(*self.warm).load(weights)
        else:
            shapes = {name: value.shape for name, value in objective.named_parameters()}
            fill(objective, family_of(config).initial_values(config, shapes))
        if self.own is None:
            pl_module.ema.start()
        gather_each_once(objective)


class _End(StageCallback):
    """Ends the loop when the run is done or asked to stop; comes last, after the step was saved."""

    def after_step(self, stage: StageModule) -> None:
        stage.trainer.should_stop = stage.is_done
        stage.watchdog.beat(f"reading the rows of step {stage.state.step + 1}")


def _explained(error: Exception, stage: StageModule) -> Exception:
    """What ended a run, as one message where it is a lost process or reader; else the error."""
    if isinstance(error, UserError):
        return error
    rank, world_size = stage.processes.rank, stage.processes.world_size
    step, doing = stage.state.step + 1, stage.watchdog.doing
    # A reader's death interrupts the main thread wherever it is: other errors may be wrapped around
    # that one.
    reader_died = "DataLoader worker"
    whole: BaseException = error
    while reader_died not in str(whole):
        inner = whole.__cause__ or whole.__context__
        if inner is None:
            break
        whole = inner
    going_on = "The last checkpoint is intact; run the same command again to go on from it."
    if reader_died in str(whole):
        rows = stage.config.trainer.global_batch_size
        first = (step - 1) * rows + rank * rows // world_size
        # A failure in the reader comes with its traceback: the error and its note are at the end.
        cause = "; ".join(str(whole).strip().splitlines()[-2:])
        return UserError(
            f"Rank {rank}: a process that reads data died or failed while step {step} waited for "
            f"its rows, samples {first} to {first + rows // world_size - 1} (and those read "
            f"ahead): {cause}. Lack of memory and a file that vanished are usual causes. {going_on}"
        )
    text = str(error)
    if re.search(r"[Cc]onnection (closed|reset|refused)|gloo|NCCL|[Tt]imed out|Broken pipe", text):
        return UserError(
            f"Rank {rank} lost another process of the run while {doing} (step {step}): "
            f"{text.strip().splitlines()[0]}. The other ranks' messages say which ended first and "
            f"why. {going_on}"
        )
    error.add_note(f"on rank {rank}, while {doing} (step {step})")
    return error

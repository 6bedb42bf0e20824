"""A run's loop in this process: its objective under Lightning's Trainer, with its callbacks.

Importing Lightning takes seconds, most of it for metrics that nothing here uses. So only this
module and those that it brings together import it; `run.py` asks for this one when there is
something to train.
"""

from pathlib import Path

import lightning.pytorch as pl

from cola_train.config.run import RunConfig
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
from cola_train.training.checkpoints.folder import saved_steps
from cola_train.training.checkpoints.resume import Saved, intact_checkpoint
from cola_train.training.checkpoints.tensors import CheckpointReader
from cola_train.training.data import RunData
from cola_train.training.loop.ending import ending, explained
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
    start = _Start(own, warm)
    callbacks: list[pl.Callback] = [start, metrics, Progress()]
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
        stage.watchdog.tell = lambda reason: write_status(
            run_folder, Status("failed", stage.state.step, reason)
        )
    try:
        trainer = build_trainer(config, processes, callbacks)
        with stage.watchdog:
            loader = data.train_loader(processes.rank, processes.world_size)
            trainer.fit(stage, train_dataloaders=loader)
        if alarms.stopped_by is not None and not stage.budget.is_spent(stage.state):
            raise RunStoppedError(
                f"stopped by alarm (alarms.stop) and saved: {alarms.stopped_by} The same command "
                "again goes on from there; the alarm is not raised again before it was over."
            )
    except BaseException as error:
        # Lightning's cleaning up may fail in its turn, and hide what ended the loop.
        cause = start.error or error
        problem = explained(cause, stage) if isinstance(cause, Exception) else cause
        if first:
            saved = max(saved_steps(run_folder), default=0)
            write_status(run_folder, ending(problem, stage.state.step, saved))
        if problem is error:
            raise
        raise problem from (None if problem is cause else cause)
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
        self.error: BaseException | None = None  # what ended the loop, if something did

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.error = exception

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

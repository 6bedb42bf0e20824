"""From a config to a finished run: start it, or go on with it where it stopped. A run's folder is its own, never overwritten."""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl

from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.data.packing import TRAIN
from cola_train.data.prepared import MANIFEST_FILE
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.registry import family_of
from cola_train.processes import Processes, connected
from cola_train.run_folder import Status, read_run_config, read_status, write_status
from cola_train.run_layout import CONFIG, EXPORT, SUMMARY, TOKENIZER, folder_of
from cola_train.training.callbacks.alarms import Alarms
from cola_train.training.callbacks.in_loop_evaluation import Watch, benchmark_samples
from cola_train.training.callbacks.metrics import Metrics, Progress, wandb_loggers
from cola_train.training.callbacks.pace import cost_in_words
from cola_train.training.callbacks.samples import Samples
from cola_train.training.callbacks.saver import Saver
from cola_train.training.callbacks.start import Start
from cola_train.training.callbacks.validation import Validation
from cola_train.training.checkpoints.export import export_checkpoint, export_marks
from cola_train.training.checkpoints.folder import intact_manifest, latest_checkpoint, saved_steps, step_folder
from cola_train.training.checkpoints.resume import Saved, intact_checkpoint
from cola_train.training.data import PreparedDataModule
from cola_train.training.loop.budget import Budget
from cola_train.training.loop.guard import RunStoppedError
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.lightning import build_trainer
from cola_train.training.loop.module import StageModule
from cola_train.training.loop.step_log import Attempt, StepLog
from cola_train.training.loop.watchdog import Watchdog
from cola_train.training.parallel.sharding import check_mesh
from cola_train.training.preflight import open_data, take_over

RunT = TypeVar("RunT", bound=RunConfig)


def train(config: RunConfig) -> Status:
    """Train a run to its last step or the end of its budget; returns how it stands.

    Every process of the run calls this. It begins at the first step, or where the run's last checkpoint is. A run that a signal
    stopped is "interrupted": the same call goes on with it.

    Raises:
        UserError: the run's folder holds another run, or anything in data, tokenizer or checkpoint does not fit the config.
        RunStoppedError: too many steps in a row had to be skipped.
    """
    stop = StopRequest()
    with contextlib.ExitStack() as held:
        held.enter_context(stop.listening())
        processes = held.enter_context(connected(config.trainer.accelerator, config.parallel.timeout_seconds))
        check_mesh(config.parallel, processes)
        config = processes.agree(lambda: take_over(config, held))
        run_folder = folder_of(config)
        datamodule, tokenizer = open_data(config)
        data_sha256 = hashlib.sha256((datamodule.prepared.folder / MANIFEST_FILE).read_bytes()).hexdigest()
        own = intact_checkpoint(run_folder, processes, config.checkpoint.if_damaged)
        if own is not None and own[1].data_sha256 != data_sha256:
            raise UserError(
                f"The data in {config.data.path} is not what {run_folder} was trained on so far (its manifest.json differs); the "
                "order of its samples would change. Put back that data, or start another run: cola-train warm-start."
            )
        if own is None or not Budget(config).is_spent(own[1].state):
            status = _fit(config, processes, stop, datamodule, tokenizer, data_sha256, own)
        else:
            status = Status("finished", own[1].step)
        if processes.is_first:
            _conclude(config, status, tokenizer)
        processes.barrier()
        return status


def _conclude(config: RunConfig, status: Status, tokenizer: Tokenizer) -> None:
    """Export a finished run, once; say and note how it stands."""
    run_folder = folder_of(config)
    if status.state == "interrupted":
        say(f"Stopped by {status.reason}; saved at step {status.step}. The same command again goes on from there.")
    elif read_status(run_folder) == status:
        say(f"{run_folder} is finished at step {status.step}; a larger trainer.max_steps or budget goes on with it.")
    else:
        folder = step_folder(run_folder, status.step)
        export_checkpoint(config, folder, tokenizer, run_folder / EXPORT, use_average=config.ema.export, replace=True)
        export_marks(config, run_folder, tokenizer)
        if (run_folder / SUMMARY).is_file():
            say(f"{run_folder}: {cost_in_words(json.loads((run_folder / SUMMARY).read_text(encoding='utf-8')))}")
    write_status(run_folder, status)


def resume(run_folder: Path, stage: type[RunConfig], overrides: Sequence[str] = ()) -> RunConfig:
    """The config with which to go on with a run, given its folder alone.

    Raises:
        UserError: not a run of this stage.
    """
    config = read_run_config(run_folder)
    if not isinstance(config, stage):
        raise UserError(f"{run_folder} is a run of `cola-train {config.stage}`; resume it with that verb.")
    given = load_config(type(config), run_folder / CONFIG, overrides)
    # The folder may have been moved or named from elsewhere: it is where the user says.
    return dataclasses.replace(given, runs_folder=str(run_folder.parent), name=run_folder.resolve().name)


def warm_started(config: RunT, source: Path) -> RunT:
    """The config of a new run that begins with the weights of the run in `source`, and with nothing else of it.

    Raises:
        UserError: `source` is no run of this stage with a checkpoint, or the new run exists already.
    """
    other = read_run_config(source)
    require(type(other) is type(config), f"{source} is a run of `cola-train {other.stage}`; its weights fit no other.")
    require(latest_checkpoint(source) is not None, f"{source} has no checkpoint yet to take weights from.")
    require(not folder_of(config).exists(), f"{folder_of(config)} exists and is not overwritten; choose another name=...")
    return dataclasses.replace(config, warm_start_from=str(source))


def export_run(run_folder: Path, step: int | None, out: Path | None, max_shard_bytes: int, use_average: bool = False) -> Path:
    """Write a saved checkpoint of a run (the latest without `step`) in the released layout; returns the folder.

    Without `out` it replaces RUN/hf; another folder must not exist yet.
    """
    config = read_run_config(run_folder)
    folder = latest_checkpoint(run_folder) if step is None else step_folder(run_folder, step)
    if folder is None or not folder.is_dir():
        which = "yet" if step is None else f"of step {step}; it has {saved_steps(run_folder)}"
        raise UserError(f"{run_folder} has no checkpoint {which}.")
    intact_manifest(folder)
    tokenizer = Tokenizer.load(run_folder / TOKENIZER)
    target = out or run_folder / EXPORT
    export_checkpoint(
        config, folder, tokenizer, target, use_average=use_average, replace=out is None, max_shard_bytes=max_shard_bytes
    )
    return target


def _fit(
    config: RunConfig,
    processes: Processes,
    stop: StopRequest,
    datamodule: PreparedDataModule,
    tokenizer: Tokenizer,
    data_sha256: str,
    own: Saved | None,
) -> Status:
    run_folder, first = folder_of(config), processes.is_first
    datamodule.start_step = done = 0 if own is None else own[1].step
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
    validates = config.trainer.validate_every_steps > 0 and datamodule.num_validation_rows > 0
    if validates:
        callbacks.append(Validation(config, datamodule, metrics.log_evaluation))
    alarms = Alarms(config, run_folder, first, metrics.log_evaluation)
    logs.append(alarms.lines)
    if config.watch.is_on:
        samples_of = benchmark_samples(config.watch)
        callbacks.append(Watch(config, datamodule.prepared, samples_of, tokenizer, metrics.log_evaluation, alarms.see_inspection))
    callbacks += [alarms, Saver(config, run_folder, processes, tokenizer, data_sha256, validates), _End()]
    if first:
        write_status(run_folder, Status("running", done))
        attempt = Attempt(
            from_step=done,
            world_size=processes.world_size,
            strategy=config.parallel.strategy,
            micro_batch_size=config.trainer.micro_batch_size,
            global_batch_size=config.trainer.global_batch_size,
            num_rows=datamodule.prepared.num_rows(TRAIN),
            seed=config.seed,
            data_seed=config.data_seed,
            data_sha256=data_sha256,
        )
        stage.step_log = StepLog(run_folder, attempt)
        stage.logs = [*logs, stage.step_log.lines]
    trainer = build_trainer(config, processes, callbacks)
    try:
        with watchdog:
            trainer.fit(stage, datamodule=datamodule)
        if alarms.stopped_by is not None and not stage.budget.is_spent(stage.state):
            raise RunStoppedError(
                f"stopped by alarm (alarms.stop) and saved: {alarms.stopped_by} The same command again goes on from there; the "
                "alarm is not raised again before it was over."
            )
    except Exception as error:
        problem = _explained(error, processes, stage, watchdog.doing, config)
        if first:
            write_status(
                run_folder, Status("stopped" if isinstance(error, RunStoppedError) else "failed", stage.state.step, str(problem))
            )
        if problem is error:
            raise
        raise problem from error
    if stage.budget.is_spent(stage.state):
        return Status("finished", stage.state.step)
    return Status("interrupted", stage.state.step, f"{stop.signal_name or 'a signal to another process'}")


class _End(pl.Callback):
    """Ends the loop after the last step, or when asked to; comes last, when the step has been saved."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """A batch is an optimizer step."""
        assert isinstance(pl_module, StageModule)
        trainer.should_stop = pl_module.is_done
        pl_module.watchdog.beat(f"reading the rows of step {pl_module.state.step + 1}")


def _explained(error: Exception, processes: Processes, stage: StageModule, doing: str, config: RunConfig) -> Exception:
    """What ended a run, as one message where it was not our doing: a lost process, a dead data worker. Else the error itself."""
    if isinstance(error, UserError):
        return error
    rank, step = processes.rank, stage.state.step + 1
    # A reader's death interrupts the main thread wherever it is: others' errors may be wrapped around that one.
    whole: BaseException = error
    while "DataLoader worker" not in str(whole) and (inner := whole.__cause__ or whole.__context__) is not None:
        whole = inner
    text = str(whole) if "DataLoader worker" in str(whole) else str(error)
    going_on = "The last checkpoint is intact; run the same command again to go on from it."
    if "DataLoader worker" in text:
        rows = config.trainer.global_batch_size
        first = (step - 1) * rows + rank * rows // processes.world_size
        # Of a failure in the reader its traceback is quoted: the error and its note come last.
        cause = "; ".join(text.strip().splitlines()[-2:])
        return UserError(
            f"Rank {rank}: a process that reads data died or failed while step {step} waited for its rows, samples {first} to "
            f"{first + rows // processes.world_size - 1} (and those read ahead): {cause}. Lack of memory and a file that vanished "
            f"are usual causes. {going_on}"
        )
    if re.search(r"[Cc]onnection (closed|reset|refused)|gloo|NCCL|[Tt]imed out|Broken pipe", text):
        return UserError(
            f"Rank {rank} lost another process of the run while {doing} (step {step}): {text.strip().splitlines()[0]}. The other "
            f"ranks' messages say which ended first and why. {going_on}"
        )
    error.add_note(f"on rank {rank}, while {doing} (step {step})")
    return error



"""Before a run computes: what can be refused is refused; its folder is made or taken over."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from cola_train.config.evaluation import InLoopEvalConfig
from cola_train.config.run import RunConfig
from cola_train.config.settings import require
from cola_train.data.packing import VALIDATION
from cola_train.devices import cpu_bf16_is_fast, uses_gpu
from cola_train.evaluation.benchmarks.tasks import TASKS, Sample, read_samples
from cola_train.families.registry import family_of
from cola_train.files import sweep, write_errors_explained
from cola_train.programs import check_temporary_folder
from cola_train.run_folder import locked, require_data, saved_config, write_config
from cola_train.run_layout import CHECKPOINTS, LOGS, MARKS, TOKENIZER, folder_of
from cola_train.training.checkpoints.folder import (
    clean,
    latest_checkpoint,
    repair_latest,
    saved_steps,
)
from cola_train.training.data import RunData
from cola_train.training.optim.schedule import Schedule
from cola_train.training.parallel.blocks import check_compiler, check_precision

RunT = TypeVar("RunT", bound=RunConfig)


def refuse(config: RunConfig) -> None:
    """Raise what `take_over` would, without touching anything; before processes are started."""
    check_precision(config.trainer)
    saved_config(config)
    check_compiler(config.trainer.compile, uses_gpu(config.trainer.accelerator))
    open_data(config)


def take_over(config: RunT, data: RunData, held: contextlib.ExitStack) -> RunT:
    """Make the run's folder, or take over that of the same run, locked until `held` ends.

    Called on process 0. The config is returned as it is saved, with nothing left to be decided by
    the machine.

    Raises:
        UserError: the folder is another run's, in use or not to be written.
    """
    # Before the lock, whose file may not be put into a folder that is no run's.
    with_precision(config, saved_config(config))
    check_compiler(config.trainer.compile, uses_gpu(config.trainer.accelerator))
    run_folder = folder_of(config)
    with write_errors_explained(run_folder):
        run_folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(run_folder))
        # And again: whoever held the lock meanwhile may have begun another run here.
        config = with_precision(config, saved_config(config))
        _remove_leftovers(run_folder)
        repair_latest(run_folder)
        write_config(run_folder, config)
        if not (run_folder / TOKENIZER).exists():
            data.prepared.tokenizer.save(run_folder / TOKENIZER)
    return config


def _remove_leftovers(run_folder: Path) -> None:
    """Remove what earlier processes of the run were writing when they were killed."""
    clean(run_folder)
    for folder in (run_folder, run_folder / CHECKPOINTS, run_folder / MARKS):
        sweep(folder)
    for logs in (run_folder / LOGS).glob("*-*"):
        # A launcher holds no lock; its folder's name ends with its number.
        launcher = logs.name.rpartition("-")[2]
        if not (launcher.isdecimal() and psutil.pid_exists(int(launcher))):
            sweep(logs)


def with_precision(config: RunT, saved: RunConfig | None) -> RunT:
    """`auto` made definite, so that the saved config says what the run computes in, anywhere."""
    trainer = config.trainer
    check_precision(trainer)
    if trainer.precision != "auto":
        return config
    if saved is not None:
        precision = saved.trainer.precision
    elif uses_gpu(trainer.accelerator):
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    else:
        precision = "bf16" if cpu_bf16_is_fast() else "fp32"
    return dataclasses.replace(config, trainer=dataclasses.replace(trainer, precision=precision))


def open_data(config: RunConfig) -> RunData:
    """The data of a run; everything that can be refused before the run exists is refused here."""
    require_data(config)
    if config.data.num_workers:
        check_temporary_folder()
    trainer, evaluation = config.trainer, config.in_loop_eval
    data = RunData(
        config.data,
        global_batch_size=trainer.global_batch_size,
        micro_batch_size=trainer.micro_batch_size,
        validation_rows=trainer.validation_rows,
        data_seed=config.data_seed,
    )
    tokenizer = data.prepared.tokenizer
    key = config.vocab_size_key
    require(
        tokenizer.vocab_size <= config.vocab_size,
        f"{key} ({config.vocab_size}) is below the data's tokenizer, which has "
        f"{tokenizer.vocab_size} ids; set {key}={tokenizer.vocab_size}.",
    )
    Schedule.of(config)
    benchmark_samples(evaluation)
    sees_rows = evaluation.is_on and evaluation.evaluators != ["benchmarks"]
    require(
        not sees_rows or data.prepared.num_rows(VALIDATION) > 0,
        f"in_loop_eval.evaluators={evaluation.evaluators} looks at held-out rows, and "
        f"{config.data.path} has none; prepare it with held_out_share above 0.",
    )
    family_of(config).check_data(config, data.prepared)
    # What a run began from may be gone once it has a checkpoint of its own.
    if not saved_steps(folder_of(config)):
        family_of(config).check_start(config, data.prepared)
        source = config.warm_start_from
        require(
            source is None or latest_checkpoint(Path(source)) is not None,
            f"warm_start_from={source} is no run with a checkpoint, and this run has none of its "
            "own yet: if that one has moved, give warm_start_from=... where it lies now.",
        )
    return data


def benchmark_samples(config: InLoopEvalConfig) -> dict[str, list[Sample]]:
    """What in-loop evaluation asks, by task; a UserError if data are unfit."""
    if not config.is_on or "benchmarks" not in config.evaluators:
        return {}
    asked = TASKS if config.tasks == ["all"] else config.tasks
    assert config.benchmark_data is not None
    folder, most = Path(config.benchmark_data), config.benchmarks.num_samples
    return {task: read_samples(folder, task)[:most] for task in asked}

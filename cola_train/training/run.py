"""From a config to a finished run: start or resume it, in a folder that is never overwritten."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from cola_train.config.content import read_bytes
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.console import only_warned, outliving_console, say
from cola_train.data.tokenizer import Tokenizer
from cola_train.devices import device_peak
from cola_train.json_text import parse_json
from cola_train.processes import connected
from cola_train.run_folder import (
    Status,
    locked,
    placed,
    read_run_config,
    read_status,
    write_status,
)
from cola_train.run_layout import (
    CONFIG,
    EXPORT,
    LOSSES_PLOT,
    METRICS,
    SUMMARY,
    TOKENIZER,
    folder_of,
)
from cola_train.training.callbacks.pace import cost_in_words, write_summary
from cola_train.training.checkpoints.export import export_checkpoint, export_marks
from cola_train.training.checkpoints.folder import (
    intact_manifest,
    latest_checkpoint,
    saved_steps,
    step_folder,
)
from cola_train.training.checkpoints.resume import intact_checkpoint
from cola_train.training.data import RunData
from cola_train.training.loop.budget import Budget
from cola_train.training.loop.ending import ending
from cola_train.training.loop.interrupts import StopRequest
from cola_train.training.loop.state import RunState
from cola_train.training.parallel.sharding import check_mesh
from cola_train.training.preflight import open_data, take_over

RunT = TypeVar("RunT", bound=RunConfig)


def train(config: RunConfig) -> Status:
    """Train a run to its last step or the end of its budget; returns how it stands.

    Every process of the run calls this. It begins at the first step, or resumes from the run's last
    checkpoint. A run that a signal stopped is "interrupted": the same call resumes it.

    Raises:
        UserError: the run's folder holds another run, or anything in data, tokenizer or checkpoint
            does not fit the config.
        RunStoppedError: too many steps in a row had to be skipped.
    """
    stop = StopRequest()
    with contextlib.ExitStack() as held:
        held.enter_context(outliving_console())
        processes = held.enter_context(
            connected(config.trainer.accelerator, config.parallel.timeout_seconds)
        )
        # Not before: a signal has to end a process that waits for others that do not come.
        held.enter_context(stop.listening())
        check_mesh(config.parallel, processes)
        opened: list[RunData] = []

        def begin() -> RunConfig:
            opened.append(open_data(config))
            return take_over(config, opened[0], held)

        taken = processes.agree(begin)
        # Process 0, which decides, has opened its own.
        data = opened[0] if opened else open_data(taken)
        config, run_folder, tokenizer = taken, folder_of(taken), data.prepared.tokenizer
        own = intact_checkpoint(run_folder, processes, config.checkpoint.if_damaged)
        if own is not None and own[1].data_sha256 != data.sha256:
            raise UserError(
                f"The data in {config.data.path} is not what {run_folder} was trained on so far "
                "(its manifest.json differs); the order of its samples would change. Put back "
                "that data, or start another run: cola-train warm-start."
            )
        if own is None or not Budget(config).is_spent(own[1].state):
            # Not above: what is refused is refused before Lightning is imported, and what only
            # reads a run never imports it.
            from cola_train.training.fit import fit

            status = fit(config, processes, stop, data, own)
        else:
            status = Status("finished", own[1].step)
            if processes.is_first:
                _complete(config, own[1].state, processes.device)
        if processes.is_first:
            try:
                _conclude(config, status, tokenizer)
            except BaseException as error:
                write_status(run_folder, ending(error, status.step, status.step))
                raise
        # The run is what it is by now, whatever has become of the others.
        told = "not all processes were there at the run's end"
        with only_warned(told) if processes.is_first else contextlib.nullcontext():
            processes.barrier()
        return status


def _complete(config: RunConfig, state: RunState, device: torch.device) -> None:
    """Write what a run leaves at its end, where something ended it after its last checkpoint."""
    run_folder = folder_of(config)
    first = config.branched_from
    if first is not None and Path(first).name == step_folder(run_folder, state.step).name:
        return  # a branch that had nothing left to do has cost nothing
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        summary = parse_json(read_bytes(run_folder / SUMMARY).decode())
        if summary["steps"] == state.step:
            return
    # matplotlib takes a second to import
    from cola_train.training.callbacks.plots import draw_losses

    with only_warned(f"the pictures in {run_folder} were not drawn"):
        draw_losses(run_folder / METRICS, run_folder / LOSSES_PLOT)
    write_summary(run_folder, state, device_peak(device, config.trainer.precision))


def _conclude(config: RunConfig, status: Status, tokenizer: Tokenizer) -> None:
    """Export a finished run, once; write how it stands to its status, and say it."""
    run_folder = folder_of(config)
    if status.state == "interrupted":
        told = (
            f"Stopped by {status.reason}; saved at step {status.step}. The same command again goes "
            "on from there."
        )
    else:
        told = (
            f"{run_folder} is finished at step {status.step}; a larger trainer.max_steps or budget "
            "goes on with it."
        )
        if read_status(run_folder) != status:
            folder = step_folder(run_folder, status.step)
            target, use_ema = run_folder / EXPORT, config.ema.export
            export_checkpoint(config, folder, tokenizer, target, use_ema=use_ema, replace=True)
            export_marks(config, run_folder, tokenizer)
            # A branch that had nothing left to do has no summary: it has cost nothing.
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                summary = parse_json(read_bytes(run_folder / SUMMARY).decode())
                told = f"{run_folder}: {cost_in_words(summary)}"
    # Before it is told: with a closed terminal comes a signal, and there may be little time.
    write_status(run_folder, status)
    say(told)


def resume(run_folder: Path, stage: type[RunConfig], overrides: Sequence[str] = ()) -> RunConfig:
    """The config to resume a run with, given its folder by any path: it may have been moved.

    Raises:
        UserError: no run, one of another stage, or overrides that name another folder.
    """
    config = read_run_config(run_folder)
    if not isinstance(config, stage):
        raise UserError(
            f"{run_folder} is a run of `cola-train {config.stage}`; resume it with that verb."
        )
    given = load_config(type(config), run_folder / CONFIG, overrides)
    resumed = placed(given, run_folder)
    for key, same in (
        ("name", given.name in (config.name, resumed.name)),
        (
            "runs_folder",
            given.runs_folder == config.runs_folder
            or Path(given.runs_folder).resolve() == run_folder.resolve().parent,
        ),
    ):
        require(
            same,
            f"{key}={getattr(given, key)} cannot be given with --resume, which goes on with the "
            f"run in {run_folder}. Leave it out; to rename or move a run, rename or move its "
            "folder first.",
        )
    return resumed


def warm_started(config: RunT, source: Path) -> RunT:
    """The config of a new run that takes the weights of the run in `source`, and nothing else.

    Raises:
        UserError: `source` is no run of this stage with a checkpoint, or the new run exists.
    """
    other = read_run_config(source)
    require(
        type(other) is type(config),
        f"{source} is a run of `cola-train {other.stage}`; its weights fit no other.",
    )
    require(
        latest_checkpoint(source) is not None,
        f"{source} has no checkpoint yet to take weights from.",
    )
    require(
        not folder_of(config).exists(),
        f"{folder_of(config)} exists and is not overwritten; choose another name=...",
    )
    return dataclasses.replace(config, warm_start_from=str(source))


def export_run(
    run_folder: Path,
    step: int | None,
    out: Path | None,
    max_shard_bytes: int,
    use_ema: bool = False,
) -> Path:
    """Write a run's checkpoint (the latest without `step`) in the layout it ships in.

    Without `out` it replaces RUN/hf; another folder must not exist yet. Returns the folder.
    """
    config = placed(read_run_config(run_folder), run_folder)
    folder = latest_checkpoint(run_folder) if step is None else step_folder(run_folder, step)
    if folder is None or not folder.is_dir():
        which = "yet" if step is None else f"of step {step}; it has {saved_steps(run_folder)}"
        raise UserError(f"{run_folder} has no checkpoint {which}.")
    intact_manifest(folder)
    target = out or run_folder / EXPORT
    # What lies in the run's folder is written by whoever holds it.
    held = locked(run_folder, "give --out") if out is None else contextlib.nullcontext()
    with held:
        export_checkpoint(
            config,
            folder,
            Tokenizer.load(run_folder / TOKENIZER),
            target,
            use_ema=use_ema,
            replace=out is None,
            max_shard_bytes=max_shard_bytes,
        )
    return target

"""Which checkpoint a run resumes from: the newest that is intact."""

import functools
from pathlib import Path

import torch.distributed as dist

from cola_train.checksums import damage
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.processes import Processes
from cola_train.training.checkpoints.folder import (
    CheckpointManifest,
    latest_checkpoint,
    point_to,
    quarantine,
    read_manifest,
    refuse_damage,
    saved_steps,
    step_folder,
    strangers,
)

Saved = tuple[Path, CheckpointManifest]


def intact_checkpoint(run_folder: Path, processes: Processes, if_damaged: str) -> Saved | None:
    """The checkpoint to resume from, its files checked; None in a run that has saved nothing yet.

    With `if_damaged` "previous", damaged ones are renamed and the newest intact one is taken. A
    collective call.

    Raises:
        UserError: it is damaged, and `if_damaged` is "stop" or there is no other.
    """
    while True:
        folder = processes.agree(lambda: _newest(run_folder, if_damaged))
        if folder is None:
            return None
        try:
            return folder, _checked(folder, processes)
        except UserError as error:
            if if_damaged == "stop" or len(processes.agree(lambda: saved_steps(run_folder))) == 1:
                raise
            if processes.is_first:
                say(f"cola-train: warning: {error}")
            aside = processes.agree(functools.partial(quarantine, folder))
            if processes.is_first:
                say(
                    f"cola-train: warning: it is kept as {aside}; going on from the checkpoint "
                    "before it."
                )


def _newest(run_folder: Path, if_damaged: str) -> Path | None:
    try:
        return latest_checkpoint(run_folder)
    except UserError:
        steps = saved_steps(run_folder)
        if if_damaged == "stop" or not steps:
            raise
    folder = step_folder(run_folder, steps[-1])
    point_to(folder)
    return folder


def _checked(folder: Path, processes: Processes) -> CheckpointManifest:
    """`intact_manifest`, each process checking some of the files; a collective call."""
    manifest = processes.agree(lambda: read_manifest(folder))
    mine = dict(list(manifest.files.items())[processes.rank :: processes.world_size])
    found: list[list[str]] = [[] for _ in range(processes.world_size)]
    problems = damage(folder, mine, "the manifest")
    if processes.is_first:
        problems += strangers(folder, manifest)
    dist.all_gather_object(found, problems)
    refuse_damage(folder, [line for part in found for line in part])
    return manifest

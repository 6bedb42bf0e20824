"""A run's checkpoints on disk: lightning/step-N, whole or absent, and the `latest` pointer.

A checkpoint is a folder of safetensors files, one of each process, with the parts of every tensor
that it saved, and manifest.json: the step, the run's counters, every file's size and checksum.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import xxhash

from cola_train.checksums import FileChecksum, damage
from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError
from cola_train.files import sync, write_atomically
from cola_train.json_text import parse_json
from cola_train.run_layout import CHECKPOINTS, LATEST
from cola_train.training.loop.state import RunState

MANIFEST = "manifest.json"
FORMAT_VERSION = 4
_MOST_POINTER_BYTES = 1000


@dataclasses.dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint is."""

    step: int
    state: RunState
    data_sha256: str  # of the prepared data's manifest
    world_size: int  # of the processes that wrote it; any number can read it
    shapes: dict[str, tuple[int, ...]]  # of every saved tensor
    files: dict[str, FileChecksum]
    good: bool  # weights finite and, where the run validates, validated at this step
    mark: bool  # never to be removed

    def to_json(self) -> str:
        """The text of manifest.json, with a checksum of its own."""
        values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "xxh3": _checksum(values)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CheckpointManifest":
        """The inverse of `to_json`; ValueError, KeyError or TypeError on anything else."""
        values = parse_json(text)
        if values.pop("xxh3") != _checksum(values):
            raise ValueError("its own checksum does not fit")
        version = values.pop("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"format_version {version}, this version of cola-train reads {FORMAT_VERSION}"
            )
        values["state"] = RunState(**values["state"])
        values["shapes"] = {name: tuple(shape) for name, shape in values["shapes"].items()}
        values["files"] = {name: FileChecksum(**fact) for name, fact in values["files"].items()}
        return cls(**values)


def _checksum(values: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())


def step_folder(run_folder: Path, step: int) -> Path:
    """The checkpoint folder of an optimizer step."""
    return run_folder / CHECKPOINTS / f"step-{step:08d}"


def working_folder(run_folder: Path, step: int) -> Path:
    """The folder that a step's checkpoint is saved into; it counts for nothing until `finish`."""
    final = step_folder(run_folder, step)
    return final.with_name(f".saving-{final.name}")


def saved_steps(run_folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folders = (run_folder / CHECKPOINTS).glob("step-*")
    matches = (re.fullmatch(r"step-(\d+)", folder.name) for folder in folders)
    return sorted(int(match[1]) for match in matches if match)


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint that `latest` names; None in a run that has saved nothing yet.

    Raises:
        UserError: no pointer, and the newest checkpoint has no manifest that can be read; or the
            pointer names one that is not there.
    """
    pointer, steps = run_folder / CHECKPOINTS / LATEST, saved_steps(run_folder)
    named = _named_latest(pointer)
    if steps and named < (newest := step_folder(run_folder, steps[-1])).name:
        # A crash, or a change of the pointer, left it behind; without a manifest the newest was not
        # saved by us.
        with contextlib.suppress(UserError):
            read_manifest(newest)
            return newest
    if not named:
        if not (steps or os.path.lexists(pointer)):
            return None
        newest = step_folder(run_folder, steps[-1])
        with contextlib.suppress(UserError):  # the first save was killed before it was named
            read_manifest(newest)
            return newest
        raise UserError(
            f"Cannot go on with {run_folder}: it has checkpoints of steps {steps} but no "
            f"`{LATEST}` naming one, and the newest has no manifest that can be read. Go on from "
            "the newest intact one with checkpoint.if_damaged=previous."
        )
    folder = pointer.with_name(named)
    if not folder.is_dir():
        raise UserError(
            f"Cannot go on with {run_folder}: {pointer} names {named}, which is not there; "
            f"steps present: {steps}. Go on from the newest of these with "
            "checkpoint.if_damaged=previous."
        )
    return folder


def _named_latest(pointer: Path) -> str:
    """The name of the folder that the pointer names; "" where it names none."""
    try:
        text = read_bytes(pointer, _MOST_POINTER_BYTES).decode().strip()
    except (OSError, ValueError):
        return ""
    return text if re.fullmatch(r"step-\d+", text, re.ASCII) else ""


def read_manifest(folder: Path) -> CheckpointManifest:
    """A checkpoint's manifest; a UserError where it is missing or damaged."""
    try:
        return CheckpointManifest.from_json(read_bytes(folder / MANIFEST).decode())
    except FileNotFoundError:
        reason = "is missing"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"is damaged ({error})"
    raise UserError(
        f"{folder / MANIFEST} {reason}, so the checkpoint cannot be used. {recovery_hint(folder)}"
    )


def recovery_hint(folder: Path) -> str:
    """The end of a message about a checkpoint that cannot be used."""
    run_folder = folder.parent.parent
    others = [step for step in saved_steps(run_folder) if step_folder(run_folder, step) != folder]
    if not others:
        return (
            "The run has no other checkpoint: copy this one again from a backup, or start the run "
            "again under another name."
        )
    return (
        "Go on from the newest intact one with checkpoint.if_damaged=previous; the others are of "
        f"steps {others}."
    )


def intact_manifest(folder: Path) -> CheckpointManifest:
    """A checkpoint's manifest; a UserError names each file that is not as it was written."""
    manifest = read_manifest(folder)
    refuse_damage(
        folder, [*damage(folder, manifest.files, "the manifest"), *strangers(folder, manifest)]
    )
    return manifest


def strangers(folder: Path, manifest: CheckpointManifest) -> list[str]:
    """What is wrong with files that are not the checkpoint's, one line each: they would be read."""
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    return [f"{name} is no file of this checkpoint" for name in found if name not in manifest.files]


def refuse_damage(folder: Path, problems: Sequence[str]) -> None:
    """Raise a UserError that lists `problems`, if there are any."""
    if problems:
        lines = "\n  ".join(problems)
        raise UserError(f"The checkpoint {folder} is damaged:\n  {lines}\n{recovery_hint(folder)}")


def begin(run_folder: Path, step: int) -> Path:
    """Make the `working_folder` of a step, empty; returns it."""
    working = working_folder(run_folder, step)
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    return working


def finish(run_folder: Path, working: Path, manifest: CheckpointManifest) -> None:
    """Give a folder whose files are written and synced its manifest, its name, and the pointer.

    Raises:
        UserError: process 0 does not see files that other processes wrote.
        OSError: the disk refuses.
    """
    unseen = [
        name
        for name, fact in manifest.files.items()
        if not (working / name).is_file() or (working / name).stat().st_size != fact.bytes
    ]
    if unseen:
        raise UserError(
            f"{len(unseen)} of {len(manifest.files)} files, such as {unseen[0]}, are not to be "
            "seen by process 0: runs_folder must lie on a file system that all machines share"
        )
    (working / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    sync(working / MANIFEST)
    sync(working)
    final = step_folder(run_folder, manifest.step)
    working.rename(final)
    sync(final.parent)
    point_to(final)


def point_to(folder: Path) -> None:
    """Make `latest` name this checkpoint."""
    write_atomically(folder.parent / LATEST, folder.name + "\n")


def repair_latest(run_folder: Path) -> None:
    """Make `latest` name the newest checkpoint, where a crash kept `finish` from doing so."""
    with contextlib.suppress(UserError):
        folder = latest_checkpoint(run_folder)
        if folder is not None and _named_latest(folder.with_name(LATEST)) != folder.name:
            point_to(folder)


def quarantine(folder: Path) -> Path:
    """Rename a damaged checkpoint, which is kept for inspection; returns its new folder."""
    aside, number = folder.with_name(f"damaged-{folder.name}"), 0
    while aside.exists():
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}.{number}")
    folder.rename(aside)
    return aside


def remove_old(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, the newest good one, marks and damaged ones."""
    steps = saved_steps(run_folder)
    kept, good = set(steps[-keep:]), []
    for step in steps:
        try:
            manifest = read_manifest(step_folder(run_folder, step))
        except UserError:
            kept.add(step)  # damaged: not ours to throw away
            continue
        if manifest.mark:
            kept.add(step)
        if manifest.good:
            good.append(step)
    kept.update(good[-1:])
    for step in steps:
        if step not in kept:
            folder = step_folder(run_folder, step)
            # Renamed first: a removal that is interrupted must not leave half a checkpoint under a
            # checkpoint's name.
            leaving = folder.with_name(f".removing-{folder.name}")
            folder.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def clean(run_folder: Path) -> None:
    """Remove what interrupted saves and removals left; only while nothing saves into this run."""
    for folder in list((run_folder / CHECKPOINTS).glob(".*-step-*")):
        shutil.rmtree(folder, ignore_errors=True)

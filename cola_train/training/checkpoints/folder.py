"""A run's checkpoints on disk: lightning/step-N, whole or absent, each with a manifest; and the
`latest` pointer.

A checkpoint is a folder of safetensors files, one of each process, with the parts of every tensor
that it saved, and manifest.json: the step, the run's counters, every file's size and checksum.
"""

import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import xxhash

from cola_train.config.settings import UserError
from cola_train.files import sync, write_atomically
from cola_train.run_layout import CHECKPOINTS, LATEST
from cola_train.training.loop.state import RunState

MANIFEST = "manifest.json"
FORMAT_VERSION = 4
_SAVING, _REMOVING = ".saving-", ".removing-"
_READ_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True)
class FileChecksum:
    """A file as it was written."""

    bytes: int
    xxh3: str


@dataclasses.dataclass(frozen=True)
class Manifest:
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
        """As manifest.json holds it, with a checksum of its own."""
        values = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps({**values, "xxh3": _checksum(values)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The inverse of `to_json`; ValueError, KeyError or TypeError on anything else."""
        values = json.loads(text)
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


def step_of(folder: Path) -> int:
    """The optimizer step that a checkpoint folder is of."""
    return int(folder.name.removeprefix("step-"))


def saved_steps(run_folder: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folders = (
        (run_folder / CHECKPOINTS).glob("step-*") if (run_folder / CHECKPOINTS).is_dir() else []
    )
    return sorted(
        int(match[1]) for folder in folders if (match := re.fullmatch(r"step-(\d+)", folder.name))
    )


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The checkpoint that `latest` names; None in a run that has saved nothing yet.

    Raises:
        UserError: there are checkpoints but no pointer, or the pointer names one that is not there.
    """
    pointer = run_folder / CHECKPOINTS / LATEST
    steps = saved_steps(run_folder)
    if not pointer.is_file():
        if not steps:
            return None
        raise UserError(
            f"Cannot go on with {run_folder}: it has checkpoints of steps {steps} but no "
            f"`{LATEST}` naming one, and the newest has no manifest that can be read. Go on from "
            "the newest intact one with checkpoint.if_damaged=previous."
        )
    folder = run_folder / CHECKPOINTS / pointer.read_text(encoding="utf-8").strip()
    if not folder.is_dir():
        raise UserError(
            f"Cannot go on with {run_folder}: {pointer} names {folder.name}, which is not there; "
            f"steps present: {steps}. Go on from the newest of these with "
            "checkpoint.if_damaged=previous."
        )
    return folder


def read_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return Manifest.from_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = "is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"is damaged ({error})"
    raise UserError(
        f"{folder / MANIFEST} {reason}, so the checkpoint cannot be used. {recovery_hint(folder)}"
    )


def recovery_hint(folder: Path) -> str:
    """The end of a message about a checkpoint that cannot be used."""
    others = [
        step
        for step in saved_steps(folder.parent.parent)
        if step_folder(folder.parent.parent, step) != folder
    ]
    if not others:
        return (
            "The run has no other checkpoint: copy this one again from a backup, or start the run "
            "again under another name."
        )
    return (
        "Go on from the newest intact one with checkpoint.if_damaged=previous; the others are of "
        f"steps {others}."
    )


def file_checksum(path: Path) -> FileChecksum:
    """Size and checksum of a file, read from disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
            size += len(piece)
    return FileChecksum(size, digest.hexdigest())


def damage(folder: Path, files: Mapping[str, FileChecksum]) -> list[str]:
    """What is wrong with these files of a checkpoint, one line each."""
    found = []
    for name, expected in files.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                found.append(
                    f"{name} has {size} bytes, the manifest says {expected.bytes}: truncated or "
                    "half-copied"
                )
            elif file_checksum(path) != expected:
                found.append(f"{name} has been altered: its checksum is not the manifest's")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read ({error.strerror})")
    return found


def intact_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest, once all its files are known to be as they were written.

    Raises:
        UserError: each file that is not.
    """
    manifest = read_manifest(folder)
    refuse_damage(folder, damage(folder, manifest.files))
    return manifest


def refuse_damage(folder: Path, problems: Sequence[str]) -> None:
    """Raise a UserError of all `problems`, if there are any."""
    if problems:
        raise UserError(
            f"The checkpoint {folder} is damaged:\n  "
            + "\n  ".join(problems)
            + f"\n{recovery_hint(folder)}"
        )


def begin(run_folder: Path, step: int) -> Path:
    """An empty folder to save into; it counts for nothing until `finish`."""
    working = run_folder / CHECKPOINTS / f"{_SAVING}step-{step:08d}"
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    return working


def finish(run_folder: Path, working: Path, manifest: Manifest) -> None:
    """Give a folder whose files are written and synced its manifest, its name, and the pointer.

    Raises:
        UserError: files that other processes wrote are not to be seen from here.
        OSError: the disk refuses.
    """
    unseen = [
        name for name, fact in manifest.files.items() if not _has_size(working / name, fact.bytes)
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


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def point_to(folder: Path) -> None:
    """Make `latest` name this checkpoint."""
    write_atomically(folder.parent / LATEST, folder.name + "\n")


def repair_latest(run_folder: Path) -> None:
    """Make `latest` name the newest checkpoint where a crash came between its being named and its
    being pointed to.
    """
    steps = saved_steps(run_folder)
    if not steps:
        return
    newest, pointer = step_folder(run_folder, steps[-1]), run_folder / CHECKPOINTS / LATEST
    named = pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
    if named < newest.name:
        with contextlib.suppress(UserError):  # without a manifest it is none of ours
            read_manifest(newest)
            point_to(newest)


def quarantine(folder: Path) -> Path:
    """Take a damaged checkpoint out of the way under a name of its own, for whoever wants to look
    at it.
    """
    number = 0
    while (
        aside := folder.with_name(f"damaged-{folder.name}" + (f".{number}" if number else ""))
    ).exists():
        number += 1
    folder.rename(aside)
    return aside


def remove_old(run_folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, the newest good one, and marks."""
    steps = saved_steps(run_folder)
    kept = set(steps[-keep:])
    manifests = {}
    for step in steps:
        try:
            manifests[step] = read_manifest(step_folder(run_folder, step))
        except UserError:
            kept.add(step)  # damaged: not ours to throw away
    kept |= {step for step, manifest in manifests.items() if manifest.mark}
    kept |= set([step for step, manifest in manifests.items() if manifest.good][-1:])
    for step in steps:
        if step not in kept:
            folder = step_folder(run_folder, step)
            # Renamed first: a removal cut short must not leave half a checkpoint under a
            # checkpoint's name.
            leaving = folder.with_name(f"{_REMOVING}{folder.name}")
            folder.rename(leaving)
            shutil.rmtree(leaving, ignore_errors=True)


def clean(run_folder: Path) -> None:
    """Remove what saves and removals that were cut short have left. Only while no other process
    saves into this run.
    """
    leftovers: Iterable[Path] = (
        (run_folder / CHECKPOINTS).glob(".*-step-*") if (run_folder / CHECKPOINTS).is_dir() else []
    )
    for folder in list(leftovers):
        shutil.rmtree(folder, ignore_errors=True)

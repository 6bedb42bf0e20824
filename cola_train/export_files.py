"""The JSON of an exported folder, and checksums.json: sizes and checksums of the files beside it.

No other program reads checksums.json.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_train.checksums import FileChecksum, damage, file_checksum
from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.files import lfs_hint, read_errors_explained
from cola_train.json_text import parse_json

CONFIG_JSON = "config.json"
TRAINING = "training.json"  # what a checkpoint says of the run that it comes from
CHECKSUMS = "checksums.json"


def model_type(folder: Path) -> object:
    """The model_type in a Hugging Face folder's config.json; None where there is none.

    Raises:
        UserError: as of `read_json`.
    """
    path = folder / CONFIG_JSON
    return read_json(path)[0].get("model_type") if path.is_file() else None


def read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The fields of a JSON file, and its name for messages.

    Raises:
        UserError: it is missing, or holds no object.
    """
    require(
        path.is_file(), f"{path} is missing; the checkpoint is incomplete, copy or export it again."
    )
    with read_errors_explained(path):
        content = read_bytes(path)
    try:
        fields = parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); copy or export the checkpoint again."
            f"{lfs_hint(path)}"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{path} must hold an object of fields, not a {type(fields).__name__}; copy or export "
            "the checkpoint again."
        )
    return fields, str(path)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Sorted and indented, to be read by people too."""
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def add_checksums(folder: Path, names: Sequence[str]) -> None:
    """Put the sizes and checksums of these files, of which some may be absent, on record."""
    path = folder / CHECKSUMS
    facts = read_json(path)[0] if path.exists() else {}
    for name in names:
        if (folder / name).exists():
            facts[name] = dataclasses.asdict(file_checksum(folder / name))
    write_json(path, facts)


def refuse_altered(folder: Path, names: Sequence[str], needed: Sequence[str] = ()) -> None:
    """Refuse files of these names that are not as they were when they were put on record.

    Of `needed` ones all have to be on record, where there is one; else that is said.

    Raises:
        UserError: a file that was altered or is missing, or a record that cannot be read.
    """
    if not (folder / CHECKSUMS).is_file():
        _say_unchecked(folder / (*names, *needed)[-1])
        return
    facts, origin = read_json(folder / CHECKSUMS)
    again = (
        "Copy or export the checkpoint again; if you changed it yourself, and mean that, remove "
        f"{CHECKSUMS}."
    )
    try:
        on_record = [*needed, *(name for name in names if name in facts)]
        expected = {name: FileChecksum(**facts[name]) for name in on_record}
    except (KeyError, TypeError):
        raise UserError(
            f"{origin} does not have size and checksum of {', '.join(needed or names)}. {again}"
        ) from None
    for path in (folder / name for name in expected):
        hint = lfs_hint(path)
        require(not hint, f"{path} cannot be used.{hint}")
    problems = damage(folder, expected, CHECKSUMS)
    require(not problems, f"{folder}: {'; '.join(problems)}. {again}")


@functools.cache
def _say_unchecked(path: Path) -> None:
    say(
        f"{path} has no {CHECKSUMS} beside it, which exports of this program have: whether it is "
        "as it was written cannot be checked."
    )

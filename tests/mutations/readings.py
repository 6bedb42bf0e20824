"""What a command left, and what a changed file asks for, by other readers than the program's."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml


def digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def contents(path: str) -> dict[str, str]:
    files = (file for file in Path(path).rglob("*") if file.is_file())
    return {str(file): digest(str(file)) for file in sorted(files)}


def weights(run: str, step: int) -> Callable[[], Any]:
    """The weights and the counters after a step, and the export."""

    def read() -> Any:
        folder = Path(f"runs/{run}/lightning/step-{step:08d}")
        state = json.loads((folder / "manifest.json").read_text())["state"]
        tensors = [digest(str(path)) for path in sorted(folder.glob("*.safetensors"))]
        exported = {
            name: digest
            for name, digest in contents(f"runs/{run}/hf").items()
            if name.endswith(".safetensors")
        }
        return [tensors, state["step"], state["tokens"], state["flops"], exported]

    return read


def rows_of(path: str) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().split("\n") if line.strip()]


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """A config's settings as texts, numbers as they are written shortest."""
    if not isinstance(values, Mapping):
        return {prefix: _plain(values)}
    found: dict[str, str] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return str([_plain(one) for one in value])
    text = str(value)
    if text in ("", "~", "null", "Null", "NULL"):
        return "None"
    if text.lower() in ("true", "yes", "on", "y", "false", "no", "off", "n"):
        return str(text.lower() in ("true", "yes", "on", "y"))
    with contextlib.suppress(ValueError):
        return repr(float(text))
    return text


def yaml_settings(text: str) -> dict[str, str]:
    """By another reader than the program's: every scalar as its text."""
    return flat(yaml.load(text, Loader=yaml.BaseLoader) or {})


@dataclasses.dataclass(frozen=True)
class Asked:
    """What an input asks for, and what was done: two readings that have to agree.

    Attributes:
        read: what a changed file asks for, by another reader than the program's.
        done: what the results say was done; `read` has to be part of it.
    """

    read: Callable[[str], Any]
    done: Callable[[], Any]


def settings_in(path: str) -> Callable[[], Any]:
    return lambda: yaml_settings(Path(path).read_text())


def json_rows(text: str, *, skips: bool = False) -> list[Any]:
    found = []
    for line in text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n"):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError:
            if not skips:
                raise
    return found

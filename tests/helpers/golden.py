"""The reference folders under shared/golden, loaded."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from cola_train.families.cola.checkpoint import ColaCheckpoint

NAMES = ("base", "strict", "patch2")


@dataclasses.dataclass(frozen=True)
class Golden:
    """One reference checkpoint with what the released code computed from it."""

    folder: Path
    checkpoint: ColaCheckpoint
    train: dict[str, Tensor]
    samples: dict[str, Tensor]
    prompts: list[list[int]]
    results: list[dict[str, Any]]

    @classmethod
    def load(cls, folder: Path) -> "Golden":
        prompts, results = (
            _read_lines(folder / name) for name in ("prompts.jsonl", "samples.jsonl")
        )
        assert (
            [line["id"] for line in prompts] == [line["id"] for line in results] == list(range(10))
        )
        return cls(
            folder,
            ColaCheckpoint.load(folder),
            load_file(folder / "train.safetensors"),
            load_file(folder / "samples.safetensors"),
            [line["input_ids"] for line in prompts],
            results,
        )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

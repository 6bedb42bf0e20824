"""steps.jsonl: which samples every optimizer step used, over all attempts at a run; append-only.

Each attempt begins with a line of what it is; then a line for each step. `cola-train audit` checks
it against what was promised.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from cola_train.json_lines import JsonlWriter, read_lines
from cola_train.json_text import parse_json
from cola_train.randomness import philox4x32
from cola_train.run_layout import STEP_LOG

_LOW = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start or resumption of a run."""

    from_step: int  # steps of earlier attempts that count; what they did beyond was lost
    world_size: int
    strategy: str
    micro_batch_size: int
    global_batch_size: int
    num_rows: int  # of the training split
    seed: int
    data_seed: int
    data_sha256: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step as it was done."""

    step: int  # steps done with, this one included
    rows: int  # over all processes
    digest: str  # sample_digest over all processes, 16 hex digits
    skipped: str | None = None  # why it was not taken


def sample_digest(
    seed: int, sample_index: Int[Tensor, " batch"], row_index: Int[Tensor, " batch"]
) -> Int[Tensor, ""]:
    """An int64 that says which rows were used as which samples; batches add up, wrapping around.

    Each sample adds 64 bits of the generator that also draws its noise, keyed by the run's seed at
    (row, sample). So a process that reads another row, takes it for another sample, or draws other
    noise, changes the sum.
    """
    counter = (
        row_index & _LOW,
        (row_index >> 32) & _LOW,
        sample_index & _LOW,
        (sample_index >> 32) & _LOW,
    )
    words = philox4x32(counter, seed)
    return (words[0] | (words[1] << 32)).sum()


def digest_text(digest: int) -> str:
    """A digest as steps.jsonl holds it."""
    return f"{digest % (1 << 64):016x}"


class StepLog:
    """Writes steps.jsonl; on one process only."""

    def __init__(self, run_folder: Path, attempt: Attempt) -> None:
        self.lines = JsonlWriter(run_folder / STEP_LOG)
        self.lines.append({"attempt": dataclasses.asdict(attempt)})

    def write(self, step: Step) -> None:
        """Append a step."""
        values = dataclasses.asdict(step)
        self.lines.append({name: value for name, value in values.items() if value is not None})


def read_step_log(run_folder: Path) -> Iterator[Attempt | Step]:
    """Every line in order, except those that a crash cut short.

    Raises:
        ValueError: a whole line that is neither.
    """
    for line in read_lines(run_folder / STEP_LOG):
        try:
            values: Any = parse_json(line)
        except ValueError:
            continue
        try:
            yield _typed(Attempt(**values["attempt"]) if "attempt" in values else Step(**values))
        except TypeError as error:
            raise ValueError(f"{line.strip()[:80]}: {error}") from error


def _typed(entry: Attempt | Step) -> Attempt | Step:
    for field in dataclasses.fields(entry):
        kind: Any = field.type
        value = getattr(entry, field.name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{field.name} is {value!r:.40}")
    return entry

"""A run's steps.jsonl as arrays, and which of its steps count after restarts."""

import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from cola_train.config.settings import UserError
from cola_train.files import read_errors_explained
from cola_train.run_layout import STEP_LOG
from cola_train.training.loop.step_log import Attempt, read_step_log

_LARGEST_STEP = 1 << 32


@dataclass(frozen=True)
class History:
    """Every line of steps.jsonl, in order; steps count that no later attempt began before."""

    attempts: tuple[Attempt, ...]
    step: Int64[np.ndarray, " lines"]
    rows: Int64[np.ndarray, " lines"]
    digest: UInt64[np.ndarray, " lines"]
    counts: Bool[np.ndarray, " lines"]
    skipped: dict[int, str]  # step that counts -> why it was not taken


def read_history(run_folder: Path) -> History:
    """A run's log as arrays, 25 bytes a line.

    Raises:
        UserError: no run or no log there, or lines in it that are none of steps.jsonl's.
    """
    path = run_folder / STEP_LOG
    if not path.is_file():
        raise UserError(
            f"{run_folder} has no {STEP_LOG} to audit; give the folder of a run that has begun, "
            "checkpoints/NAME."
        )
    attempts: list[Attempt] = []
    # Not lists, which take several times the memory.
    attempt_of, steps, rows, digests = (array.array(code) for code in "qqqQ")
    reasons: dict[int, str] = {}
    try:
        with read_errors_explained(path):
            for entry in read_step_log(run_folder):
                if isinstance(entry, Attempt):
                    if min(entry.global_batch_size, entry.num_rows) < 1:
                        raise ValueError(f"attempt {len(attempts) + 1} has no rows")
                    attempts.append(entry)
                    continue
                if not (attempts and 1 <= entry.step <= _LARGEST_STEP):
                    raise ValueError(f"step {entry.step} of attempt {len(attempts)}")
                if entry.skipped is not None:
                    reasons[len(steps)] = entry.skipped
                attempt_of.append(len(attempts) - 1)
                steps.append(entry.step)
                rows.append(entry.rows)
                digests.append(int(entry.digest, 16))
        if not attempts:
            raise ValueError("it has no attempt")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{path} is not a log of steps ({error}); audit the file as the training wrote it."
        ) from error
    attempt, step = np.array(attempt_of, dtype=np.int64), np.array(steps, dtype=np.int64)
    begins = np.array([*(entry.from_step for entry in attempts[1:]), _LARGEST_STEP], dtype=np.int64)
    counts = step <= np.minimum.accumulate(begins[::-1])[::-1][attempt]
    return History(
        attempts=tuple(attempts),
        step=step,
        rows=np.array(rows, dtype=np.int64),
        digest=np.array(digests, dtype=np.uint64),
        counts=counts,
        skipped={int(step[line]): reason for line, reason in reasons.items() if counts[line]},
    )

"""What ended a run, as one message for the user and for status.json."""

import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cola_train.config.settings import UserError
from cola_train.processes import lost_process
from cola_train.run_folder import Status
from cola_train.training.loop.guard import RunStoppedError

if TYPE_CHECKING:
    # It imports Lightning, which what only reads a run does without.
    from cola_train.training.loop.module import StageModule

_GOING_ON = "The last checkpoint is intact; run the same command again to go on from it."
_SHARED_MEMORY = "/dev/shm"
_LITTLE_BYTES = 1 << 20


def ending(error: BaseException, step: int, saved_step: int) -> Status:
    """How a run stands that an error ended after `step` steps; `saved_step` is 0 without a save."""
    if isinstance(error, KeyboardInterrupt):
        return Status("interrupted", saved_step, "SIGINT twice, so without another save")
    reason = str(error) or type(error).__name__
    return Status("stopped" if isinstance(error, RunStoppedError) else "failed", step, reason)


def explained(error: Exception, stage: "StageModule") -> Exception:
    """What ended a run, as one message where it is a lost process or reader; else the error."""
    if isinstance(error, UserError):
        return error
    rank, world_size = stage.processes.rank, stage.processes.world_size
    step, doing = stage.state.step + 1, stage.watchdog.doing
    num_workers = stage.config.data.num_workers
    if num_workers and _shared_memory_is_full(" ".join(map(str, _chain(error)))):
        return UserError(
            f"{_SHARED_MEMORY} has no room for data.num_workers={num_workers}: give the container "
            f"more (docker run --shm-size), or set data.num_workers=0. {_GOING_ON}"
        )
    # A reader's death interrupts the main thread wherever it is: other errors may be wrapped around
    # that one.
    for whole in map(str, _chain(error)):
        if "DataLoader worker" in whole:
            rows = stage.config.trainer.global_batch_size
            first = (step - 1) * rows + rank * rows // world_size
            # A failure in the reader comes with its traceback: the error and its note are at the
            # end.
            cause = "; ".join(whole.strip().splitlines()[-2:])
            return UserError(
                f"Rank {rank}: a process that reads data died or failed while step {step} waited "
                f"for its rows, samples {first} to {first + rows // world_size - 1} (and those "
                f"read ahead): {cause}. Lack of memory and a file that vanished are usual causes. "
                f"{_GOING_ON}"
            )
    if (lost := lost_process(error)) is not None:
        return UserError(
            f"Rank {rank} lost another process of the run while {doing} (step {step}): {lost}. The "
            f"other ranks' messages say which ended first and why. {_GOING_ON}"
        )
    error.add_note(f"on rank {rank}, while {doing} (step {step})")
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it came from, and so on."""
    inner: BaseException | None = error
    while inner is not None:
        yield inner
        inner = inner.__cause__ or inner.__context__


def _shared_memory_is_full(text: str) -> bool:
    """Whether errors of this text say so, or can say no more than that something is full."""
    if re.search(r"shared memory|/dev/shm|</torch_", text):
        return True
    if "No space left on device" not in text:
        return False
    try:
        return shutil.disk_usage(_SHARED_MEMORY).free < _LITTLE_BYTES
    except OSError:
        return False

"""Runs that are trained and measured as programs of their own: those of a curve, of a study."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Literal, TypeVar

from cola_train.config.run import RunConfig
from cola_train.config.settings import INTERRUPTED
from cola_train.console import say
from cola_train.programs import start
from cola_train.run_folder import read_status
from cola_train.run_layout import EXPORT
from cola_train.scaling.child_progress import child_progress

Outcome = Literal["finished", "failed", "waits"]
_SECONDS_BETWEEN_LOOKS = 5.0  # at how far runs are


@dataclasses.dataclass(frozen=True)
class Child:
    """One run."""

    name: str  # of its folder
    config: RunConfig
    arguments: tuple[str, ...]  # of cola-train
    after: tuple[str, ...]  # the runs that must be finished before


ChildT = TypeVar("ChildT", bound=Child)


def finish(
    folder: Path,
    children: Sequence[ChildT],
    measure: Callable[[ChildT], bool],
    *,
    retry: bool,
    parallel: int,
    is_trained: Callable[[ChildT], bool] | None = None,
) -> Iterator[dict[str, Outcome]]:
    """Train and measure what is missing, `parallel` runs at a time; how those that ended did.

    A run begins as soon as those that it needs have ended, in the order of `children`. Finished
    runs are not trained, interrupted ones continue, failed ones are reported and, with `retry`,
    run again from their last checkpoint. `measure` is called for every trained run, from a thread,
    and says whether it succeeded. `is_trained` is whether a run is the one that is wanted, trained
    to its end; by default, whether its folder holds a finished one.
    """

    def finish_one(child: ChildT) -> Outcome:
        run = folder / child.name
        if any(outcomes.get(name, "finished") != "finished" for name in child.after):
            return "waits"
        trained = is_finished(run) if is_trained is None else is_trained(child)
        if not trained:
            status = read_status(run)
            if status is not None and status.state in ("failed", "stopped") and not retry:
                failure = f"{child.name} had failed at step {status.step}: {status.reason}"
                say(f"{failure} (--retry runs it again)")
                return "failed"
            say(f"{child.name}: training, {child.config.trainer.max_steps:,} steps")
            if not succeeds(child.arguments, run):
                return "failed"
        return "finished" if measure(child) else "failed"

    outcomes: dict[str, Outcome] = {}
    waiting, running = list(children), dict[Future[Outcome], ChildT]()
    pending = {child.name for child in children}
    with child_progress(folder, children) as progress, ThreadPoolExecutor(parallel) as pool:
        while waiting or running:
            ready = [child for child in waiting if pending.isdisjoint(child.after)]
            # No more are given to the pool than it works on: what is in it cannot be taken back.
            for child in ready[: parallel - len(running)]:
                waiting.remove(child)
                running[pool.submit(finish_one, child)] = child
            done, _ = wait(running, _SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
            for future in done:
                child = running.pop(future)
                outcomes[child.name] = future.result()
                pending.remove(child.name)
            ended = [child for child in children if child.name in outcomes]
            progress.show(list(running.values()), ended)
            if done:
                yield outcomes


def exit_status(folder: Path, unfinished: Collection[str]) -> int:
    """1 if runs are not finished, which is said, with where to look; else 0."""
    if unfinished:
        logs = f"Their logs are {folder}/NAME.log; --retry runs failed ones again."
        say(f"Not finished: {', '.join(unfinished)}. {logs}")
    return 1 if unfinished else 0


def levels(children: Sequence[ChildT]) -> list[list[ChildT]]:
    """Runs that need no other of them, then those that need these, and so on.

    Each stands behind those that it needs.
    """
    depth: dict[str, int] = {}
    by_depth: dict[int, list[ChildT]] = {}
    for child in children:
        depth[child.name] = max((depth.get(name, -1) + 1 for name in child.after), default=0)
        by_depth.setdefault(depth[child.name], []).append(child)
    return [runs for _, runs in sorted(by_depth.items())]


def is_finished(run: Path) -> bool:
    """Whether a run's folder holds one that is trained to its end, and exported."""
    status = read_status(run)
    return status is not None and status.state == "finished" and (run / EXPORT).is_dir()


def succeeds(arguments: Sequence[str], run: Path) -> bool:
    """Run `cola-train ARGUMENTS`, with what it says appended to RUN.log; a failure is said.

    Raises:
        KeyboardInterrupt: it was stopped by a signal.
    """
    # It imports torch, which what only reads a study or a curve does without.
    from cola_train.devices import uses_gpu

    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_name(f"{run.name}.log")
    with path.open("ab") as log:
        streams = log.fileno(), log.fileno()
        process = start("cola_train", arguments, streams, fresh=uses_gpu("auto"))
    process.join()
    if process.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.exitcode == 0:
        return True
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    say(f"{run.name} failed: {lines[-1] if lines else 'no output'}")
    return False


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings by dotted key as arguments."""
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]

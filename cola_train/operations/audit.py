"""`cola-train audit`: whether every step of a run used the samples that were promised, from its
steps.jsonl alone.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt64

from cola_train.console import progress_bar
from cola_train.data.order import row_index
from cola_train.operations.step_history import History, read_history
from cola_train.training.loop.step_log import sample_digest

_SAMPLES_AT_ONCE = 1 << 16  # arrays of so many stay in a processor's cache
_SAMPLES_WORTH_A_BAR = 5_000_000
_LISTED, _SKIPS_SHOWN = 10, 3
_SAME_IN_ALL = ("seed", "data_seed", "num_rows", "global_batch_size", "data_sha256")


@dataclass(frozen=True)
class Promised:
    """What the steps of a log had to use, and how far through the data those that did so have
    come.
    """

    steps: Int64[np.ndarray, " steps"]  # of the log, ascending
    digests: UInt64[np.ndarray, " steps"]
    complete_epochs: int  # every row used exactly once
    rows_of_the_last: int  # used in the epoch that the last step ends in
    findings: tuple["Finding", ...]


@dataclass(frozen=True)
class Finding:
    """One kind of thing that is wrong: how often, and the first few in words."""

    kind: str
    number: int
    examples: tuple[str, ...]


def audit(run_folder: Path) -> int:
    """Report to stdout on the samples that a run has used. Nothing is written.

    Returns:
        The exit status: 0 if every step used what it had to, 1 if not.

    Raises:
        UserError: no run or no log there, or lines in it that are none of steps.jsonl's.
    """
    history = read_history(run_folder)
    promised = promise(history)
    findings = [
        *_attempt_findings(history),
        *_order_findings(history),
        *_sample_findings(history, promised),
        *promised.findings,
    ]
    for name, value in [("run", str(run_folder)), *_facts(history, promised)]:
        _write(f"{name:<10}{value}")
    for finding in findings:
        _write(f"{finding.kind}: {finding.number:,}")
        for example in finding.examples:
            _write(f"  {example}")
        if finding.number > len(finding.examples):
            _write(f"  and {finding.number - len(finding.examples):,} more")
    first = history.attempts[0]
    rule = (
        f"the samples it had to, in the order of seed {first.seed} and data_seed {first.data_seed}"
    )
    _write(
        f"NOT CLEAN: not every step used {rule}." if findings else f"CLEAN: every step used {rule}."
    )
    return 1 if findings else 0


def promise(history: History) -> Promised:
    """What every step of a log had to use; takes 16 bytes a step, one byte a row of the data, and
    some MB.
    """
    first = history.attempts[0]
    size, num_rows = first.global_batch_size, first.num_rows
    steps = np.unique(history.step)
    digests = np.zeros(len(steps), dtype=np.uint64)
    logged = history.step[history.counts], history.digest[history.counts]
    order = np.argsort(logged[0], kind="stable")
    logged_steps, logged_digests = logged[0][order], logged[1][order]
    epochs = _Epochs(num_rows, int(logged_steps[-1]) * size // num_rows if len(order) else 0)
    at_once = max(1, _SAMPLES_AT_ONCE // size)
    with _bar(len(steps) * size) as advance:
        for start in range(0, len(steps), at_once):
            part = steps[start : start + at_once]
            positions = (part[:, None] - 1) * size + np.arange(size, dtype=np.int64)
            rows = row_index(positions, num_rows, first.data_seed)
            digests[start : start + at_once] = _digests(first.seed, positions, rows)
            # A step that counts has used these rows if its digest says so.
            inside = slice(*np.searchsorted(logged_steps, [part[0], part[-1] + 1]))
            place = np.searchsorted(part, logged_steps[inside])
            used = place[logged_digests[inside] == digests[start + place]]
            epochs.add(positions[used].ravel(), rows[used].ravel())
            advance(positions.size)
    epochs.close()
    return Promised(
        steps, digests, epochs.complete, epochs.rows_of_the_last, tuple(epochs.findings())
    )


class _Epochs:
    """Counts the rows of each epoch. Positions come in ascending order; small epochs are counted
    many at a time.
    """

    def __init__(self, num_rows: int, gone_through: int) -> None:
        """`gone_through`: epochs of which every row should have been used."""
        self._num_rows, self._gone_through, self._first = num_rows, gone_through, 0
        self._used = np.zeros((max(1, _SAMPLES_AT_ONCE // num_rows), num_rows), dtype=np.bool_)
        self._samples = np.zeros(len(self._used), dtype=np.int64)
        self.complete = self.rows_of_the_last = 0
        self._numbers = Counter[str]()
        self._examples: dict[str, list[str]] = {
            "epochs with rows used more than once": [],
            "epochs with rows not used": [],
        }

    def add(self, positions: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]) -> None:
        epochs = positions // self._num_rows
        while len(epochs):
            if epochs[0] >= self._first + len(self._used):
                self._go_on_to(int(epochs[0]))
            here = int(np.searchsorted(epochs, self._first + len(self._used)))
            number = epochs[:here] - self._first
            self._used.reshape(-1)[number * self._num_rows + rows[:here]] = True
            self._samples += np.bincount(number, minlength=len(self._used))
            epochs, rows = epochs[here:], rows[here:]

    def close(self) -> None:
        self._go_on_to(max(self._gone_through, self._first + len(self._used)))

    def findings(self) -> Iterator[Finding]:
        for kind, texts in self._examples.items():
            yield from _finding(kind, texts, self._numbers[kind])

    def _go_on_to(self, first: int) -> None:
        twice, never = self._examples
        epochs = self._first + np.arange(len(self._used))
        distinct = np.count_nonzero(self._used, axis=1)
        over = epochs < self._gone_through
        self.complete += int(
            (over & (distinct == self._num_rows) & (self._samples == self._num_rows)).sum()
        )
        self.rows_of_the_last = int(distinct[epochs == self._gone_through].sum())
        self._note(twice, epochs, self._samples - distinct)
        self._note(never, epochs, np.where(over, self._num_rows - distinct, 0))
        skipped = min(first, self._gone_through) - int(epochs[-1]) - 1
        if skipped > 0:
            self._numbers[never] += skipped
            self._examples[never].append(
                f"epochs {epochs[-1] + 1} to {epochs[-1] + skipped}: all rows"
            )
        self._first = first
        self._used[:], self._samples[:] = False, 0

    def _note(
        self, kind: str, epochs: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]
    ) -> None:
        bad, texts = np.flatnonzero(rows), self._examples[kind]
        self._numbers[kind] += len(bad)
        bad = bad[: max(0, _LISTED - len(texts))]
        texts += [
            f"epoch {epochs[at]}: {rows[at]:,} of {self._num_rows:,} rows, by the steps that fit"
            for at in bad
        ]


def _digests(
    seed: int, positions: Int64[np.ndarray, "steps batch"], rows: Int64[np.ndarray, "steps batch"]
) -> UInt64[np.ndarray, " steps"]:
    of_steps = torch.vmap(
        lambda samples, rows_of_a_step: sample_digest(seed, samples, rows_of_a_step)
    )
    digests: UInt64[np.ndarray, " steps"] = (
        of_steps(torch.from_numpy(positions), torch.from_numpy(rows)).numpy().view(np.uint64)
    )
    return digests


@contextlib.contextmanager
def _bar(samples: int) -> Iterator[Callable[[int], Any]]:
    if samples < _SAMPLES_WORTH_A_BAR:
        yield lambda done: None
        return
    with progress_bar("auditing", "sample", total=samples) as bar:
        yield bar.update


def _finding(kind: str, texts: Sequence[str], number: int) -> Iterator[Finding]:
    if number:
        yield Finding(kind, number, tuple(texts[:_LISTED]))


def _attempt_findings(history: History) -> Iterator[Finding]:
    first = history.attempts[0]
    texts = [
        f"attempt {number} (from step {attempt.from_step}): {name} {getattr(attempt, name)}, in "
        f"attempt 1 {getattr(first, name)}"
        for number, attempt in enumerate(history.attempts, start=1)
        for name in _SAME_IN_ALL
        if getattr(attempt, name) != getattr(first, name)
    ]
    yield from _finding("attempts with other settings", texts, len(texts))


def _order_findings(history: History) -> Iterator[Finding]:
    steps = history.step[history.counts]
    last = history.attempts[-1].from_step
    # An attempt that has done nothing yet still says what was done before it.
    after = np.append(steps, last + 1) if last > steps.max(initial=0) else steps
    before = np.concatenate([[0], after])[: len(after)]
    gaps, back = np.flatnonzero(after > before + 1), np.flatnonzero(after <= before)
    texts = [f"steps {before[at] + 1} to {after[at] - 1}" for at in gaps[:_LISTED]]
    yield from _finding("gaps, where steps are missing", texts, len(gaps))
    texts = [f"step {after[at]} comes after step {before[at]}" for at in back[:_LISTED]]
    yield from _finding("steps out of turn", texts, len(back))


def _sample_findings(history: History, promised: Promised) -> Iterator[Finding]:
    size, steps, digests = history.attempts[0].global_batch_size, promised.steps, promised.digests

    def samples(step: int) -> str:
        return f"samples {(step - 1) * size} to {step * size - 1}"

    lines = np.flatnonzero(history.rows != size)
    texts = [
        f"step {history.step[at]}: {history.rows[at]} rows, not {size}" for at in lines[:_LISTED]
    ]
    yield from _finding("steps of another number of rows", texts, len(lines))
    if not len(steps):
        return
    own = np.searchsorted(steps, history.step)
    # Whose samples each line says that it used.
    order = np.argsort(digests)
    whose = order[
        np.minimum(np.searchsorted(digests, history.digest, sorter=order), len(order) - 1)
    ]
    whose = np.where(digests[own] == history.digest, own, whose)
    known, wrong = digests[whose] == history.digest, whose != own
    uses = np.bincount(whose[known & history.counts], minlength=len(steps))
    again = history.counts & (uses[whose] > 1)
    for kind, lines in (
        ("samples used more than once", np.flatnonzero(wrong & known & again)),
        ("samples out of order", np.flatnonzero(wrong & known & ~again)),
        ("steps with other samples", np.flatnonzero(~known)),
    ):
        texts = []
        for at in lines[:_LISTED]:
            step, theirs = int(history.step[at]), int(steps[whose[at]])
            lost = "" if history.counts[at] else " (lost)"
            used = (
                f"{samples(theirs)}, those of step {theirs}"
                if known[at]
                else f"digest {history.digest[at]:016x}"
            )
            texts.append(
                f"step {step}{lost}: {used}; expected {samples(step)}, digest "
                f"{digests[own[at]]:016x}"
            )
        yield from _finding(kind, texts, len(lines))
    _, first_line = np.unique(history.step, return_index=True)
    lines = np.flatnonzero(history.digest != history.digest[first_line[own]])
    texts = [
        f"step {history.step[at]}: digest {history.digest[first_line[own[at]]]:016x}, then "
        f"{history.digest[at]:016x}"
        for at in lines[:_LISTED]
    ]
    yield from _finding("steps done again with other samples", texts, len(lines))


def _facts(history: History, promised: Promised) -> list[tuple[str, str]]:
    first, counting, lost = (
        history.attempts[0],
        history.step[history.counts],
        history.step[~history.counts],
    )
    sizes = Counter(attempt.world_size for attempt in history.attempts)
    of_sizes = ", ".join(
        f"{number} with {size} process{'' if size == 1 else 'es'}" for size, number in sizes.items()
    )
    again = np.isin(lost, counting).sum()
    skipped = sorted(history.skipped.items())
    return [
        ("attempts", f"{len(history.attempts):,}: {of_sizes}"),
        (
            "steps",
            (
                f"{len(counting):,}, of {first.global_batch_size:,} samples each; the last is "
                f"{counting.max(initial=0):,}"
            ),
        ),
        ("lost", f"{len(lost):,} steps, {again:,} of them done again so far"),
        (
            "skipped",
            f"{len(skipped):,} steps"
            + "".join(f"; step {step}: {reason}" for step, reason in skipped[:_SKIPS_SHOWN]),
        ),
        (
            "epochs",
            (
                f"{promised.complete_epochs:,} complete; {promised.rows_of_the_last:,} of "
                f"{first.num_rows:,} rows of the next"
            ),
        ),
    ]


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

"""`cola-train audit`: whether every step of a run used the samples promised, by its steps.jsonl."""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt64

from cola_train.console import progress_bar
from cola_train.data.batch import row_index
from cola_train.operations.report import report
from cola_train.operations.step_history import History, read_history
from cola_train.training.loop.step_log import sample_digest

_SAMPLES_AT_ONCE = 1 << 16  # arrays of so many stay in a processor's cache
_SAMPLES_WORTH_A_BAR = 5_000_000
_LISTED, _SKIPS_SHOWN = 10, 3
_SAME_IN_ALL = ("seed", "data_seed", "num_rows", "global_batch_size", "data_sha256")


@dataclass
class Finding:
    """One kind of thing that is wrong: how often, and the first few in words."""

    kind: str
    number: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, number: int, examples: Iterable[str]) -> None:
        """Count `number` more; of their examples only the first few are made."""
        self.number += number
        self.examples += itertools.islice(examples, _LISTED - len(self.examples))


class Promised(NamedTuple):
    """What the steps of a log had to use, and the epochs that those which did so make up."""

    steps: Int64[np.ndarray, " steps"]  # of the log, ascending
    digests: UInt64[np.ndarray, " steps"]
    complete_epochs: int  # every row used exactly once
    rows_of_the_last: int  # used in the epoch that the last step ends in
    findings: tuple[Finding, ...]


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
    report(f"run       {run_folder}")
    _report_facts(history, promised)
    for finding in findings:
        report(f"{finding.kind}: {finding.number:,}")
        for example in finding.examples:
            report(f"  {example}")
        if finding.number > len(finding.examples):
            report(f"  and {finding.number - len(finding.examples):,} more")
    first = history.attempts[0]
    report(
        f"{'NOT CLEAN: not' if findings else 'CLEAN:'} every step used the samples it had to, in "
        f"the order of seed {first.seed} and data_seed {first.data_seed}."
    )
    return 1 if findings else 0


def promise(history: History) -> Promised:
    """What every step of a log had to use; takes 16 bytes a step, 1 byte a row, and some MB."""
    first = history.attempts[0]
    size, num_rows = first.global_batch_size, first.num_rows
    steps = np.unique(history.step)
    digests = np.zeros(len(steps), dtype=np.uint64)
    logged_steps, logged_digests = history.step[history.counts], history.digest[history.counts]
    order = np.argsort(logged_steps, kind="stable")
    logged_steps, logged_digests = logged_steps[order], logged_digests[order]
    epochs = _Epochs(num_rows, int(logged_steps[-1]) * size // num_rows if len(order) else 0)
    digests_of = torch.vmap(functools.partial(sample_digest, first.seed))
    at_once, samples = max(1, _SAMPLES_AT_ONCE // size), len(steps) * size
    with (
        progress_bar("auditing", "sample", total=samples)
        if samples >= _SAMPLES_WORTH_A_BAR
        else contextlib.nullcontext()
    ) as bar:
        for start in range(0, len(steps), at_once):
            part = steps[start : start + at_once]
            positions = (part[:, None] - 1) * size + np.arange(size, dtype=np.int64)
            rows = row_index(positions, num_rows, first.data_seed)
            found = digests_of(torch.from_numpy(positions), torch.from_numpy(rows))
            digests[start : start + at_once] = found.numpy().view(np.uint64)
            # A step that counts has used these rows if its digest says so.
            inside = slice(*np.searchsorted(logged_steps, [part[0], part[-1] + 1]))
            place = np.searchsorted(part, logged_steps[inside])
            used = place[logged_digests[inside] == digests[start + place]]
            epochs.add(positions[used].ravel(), rows[used].ravel())
            if bar is not None:
                bar.update(positions.size)
    epochs.close()
    findings = tuple(finding for finding in (epochs.twice, epochs.never) if finding.number)
    return Promised(steps, digests, epochs.complete, epochs.rows_of_the_last, findings)


class _Epochs:
    """Counts each epoch's rows, small epochs many at a time; positions come in ascending order.

    Attributes:
        complete: epochs of which every row was used exactly once.
        rows_of_the_last: rows used in the epoch after those that are due.
        twice, never: what is wrong.
    """

    def __init__(self, num_rows: int, due: int) -> None:
        """`due`: epochs of which every row should have been used."""
        self._num_rows, self._due, self._first = num_rows, due, 0
        self._used = np.zeros((max(1, _SAMPLES_AT_ONCE // num_rows), num_rows), dtype=np.bool_)
        self._samples = np.zeros(len(self._used), dtype=np.int64)
        self.complete = self.rows_of_the_last = 0
        self.twice = Finding("epochs with rows used more than once")
        self.never = Finding("epochs with rows not used")

    def add(self, positions: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]) -> None:
        epochs = positions // self._num_rows
        while len(epochs):
            if epochs[0] >= self._first + len(self._used):
                self._advance_to(int(epochs[0]))
            here = int(np.searchsorted(epochs, self._first + len(self._used)))
            number = epochs[:here] - self._first
            self._used.reshape(-1)[number * self._num_rows + rows[:here]] = True
            self._samples += np.bincount(number, minlength=len(self._used))
            epochs, rows = epochs[here:], rows[here:]

    def close(self) -> None:
        self._advance_to(max(self._due, self._first + len(self._used)))

    def _advance_to(self, first: int) -> None:
        epochs = self._first + np.arange(len(self._used))
        distinct = np.count_nonzero(self._used, axis=1)
        over = epochs < self._due
        whole = (distinct == self._num_rows) & (self._samples == self._num_rows)
        self.complete += int((over & whole).sum())
        self.rows_of_the_last = int(distinct[epochs == self._due].sum())
        for finding, rows in (
            (self.twice, self._samples - distinct),
            (self.never, np.where(over, self._num_rows - distinct, 0)),
        ):
            bad = np.flatnonzero(rows)
            finding.add(
                len(bad),
                (
                    f"epoch {epochs[at]}: {rows[at]:,} of {self._num_rows:,} rows, by the steps "
                    "that fit"
                    for at in bad
                ),
            )
        last = int(epochs[-1])
        skipped = min(first, self._due) - last - 1
        if skipped > 0:
            self.never.add(skipped, [f"epochs {last + 1} to {last + skipped}: all rows"])
        self._first = first
        self._used[:], self._samples[:] = False, 0


def _finding(
    kind: str, wrong: Bool[np.ndarray, " n"], text: Callable[[int], str]
) -> Iterator[Finding]:
    places = np.flatnonzero(wrong)
    if len(places):
        yield Finding(kind, len(places), [text(int(place)) for place in places[:_LISTED]])


def _attempt_findings(history: History) -> Iterator[Finding]:
    first = history.attempts[0]
    texts = [
        f"attempt {number} (from step {attempt.from_step}): {name} {getattr(attempt, name)}, in "
        f"attempt 1 {getattr(first, name)}"
        for number, attempt in enumerate(history.attempts, start=1)
        for name in _SAME_IN_ALL
        if getattr(attempt, name) != getattr(first, name)
    ]
    if texts:
        yield Finding("attempts with other settings", len(texts), texts[:_LISTED])


def _order_findings(history: History) -> Iterator[Finding]:
    steps = history.step[history.counts]
    last = history.attempts[-1].from_step
    # An attempt that has done nothing yet still says what was done before it.
    after = np.append(steps, last + 1) if last > steps.max(initial=0) else steps
    before = np.concatenate([[0], after])[: len(after)]
    yield from _finding(
        "gaps, where steps are missing",
        after > before + 1,
        lambda at: f"steps {before[at] + 1} to {after[at] - 1}",
    )
    yield from _finding(
        "steps out of turn",
        after <= before,
        lambda at: f"step {after[at]} comes after step {before[at]}",
    )


def _sample_findings(history: History, promised: Promised) -> Iterator[Finding]:
    size, steps, digests = history.attempts[0].global_batch_size, promised.steps, promised.digests
    yield from _finding(
        "steps of another number of rows",
        history.rows != size,
        lambda at: f"step {history.step[at]}: {history.rows[at]} rows, not {size}",
    )
    if not len(steps):
        return
    own = np.searchsorted(steps, history.step)
    # Whose samples each line says that it used.
    order = np.argsort(digests)
    place = np.searchsorted(digests, history.digest, sorter=order)
    whose = order[np.minimum(place, len(order) - 1)]
    whose = np.where(digests[own] == history.digest, own, whose)
    known, wrong = digests[whose] == history.digest, whose != own
    uses = np.bincount(whose[known & history.counts], minlength=len(steps))
    again = history.counts & (uses[whose] > 1)

    def samples(step: int) -> str:
        return f"samples {(step - 1) * size} to {step * size - 1}"

    def used(at: int) -> str:
        step, theirs = int(history.step[at]), int(steps[whose[at]])
        lost = "" if history.counts[at] else " (lost)"
        used = f"digest {history.digest[at]:016x}"
        if known[at]:
            used = f"{samples(theirs)}, those of step {theirs}"
        expected = f"{samples(step)}, digest {digests[own[at]]:016x}"
        return f"step {step}{lost}: {used}; expected {expected}"

    yield from _finding("samples used more than once", wrong & known & again, used)
    yield from _finding("samples out of order", wrong & known & ~again, used)
    yield from _finding("steps with other samples", ~known, used)
    _, first_line = np.unique(history.step, return_index=True)
    first_digest = history.digest[first_line[own]]
    yield from _finding(
        "steps done again with other samples",
        history.digest != first_digest,
        lambda at: (
            f"step {history.step[at]}: digest {first_digest[at]:016x}, then "
            f"{history.digest[at]:016x}"
        ),
    )


def _report_facts(history: History, promised: Promised) -> None:
    first, counting = history.attempts[0], history.step[history.counts]
    lost = history.step[~history.counts]
    sizes = Counter(attempt.world_size for attempt in history.attempts)
    of_sizes = ", ".join(
        f"{number} with {size} process{'' if size == 1 else 'es'}" for size, number in sizes.items()
    )
    skipped = sorted(history.skipped.items())
    reasons = "".join(f"; step {step}: {reason}" for step, reason in skipped[:_SKIPS_SHOWN])
    report(f"attempts  {len(history.attempts):,}: {of_sizes}")
    report(
        f"steps     {len(counting):,}, of {first.global_batch_size:,} samples each; the last is "
        f"{counting.max(initial=0):,}"
    )
    again = np.isin(lost, counting).sum()
    report(f"lost      {len(lost):,} steps, {again:,} of them done again so far")
    report(f"skipped   {len(skipped):,} steps{reasons}")
    report(
        f"epochs    {promised.complete_epochs:,} complete; {promised.rows_of_the_last:,} of "
        f"{first.num_rows:,} rows of the next"
    )

"""Whether two runs ended alike: every tensor, metric and sample, to the bit or nearly."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cola_train.json_lines import read_log
from cola_train.run_layout import CLOCKS, METRICS
from cola_train.training.checkpoints.folder import intact_manifest, latest_checkpoint
from cola_train.training.checkpoints.tensors import CheckpointReader
from cola_train.training.loop.state import MODEL, RunState
from cola_train.training.loop.step_log import Step, read_step_log

_LARGEST_LOSS_DIFFERENCE = 1e-4
_NOT_COMPARED = CLOCKS | {"step"}
Metrics = dict[tuple[int, str], float | None]  # by step and name


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """What a run has come to, from its folder."""

    tensors: dict[str, Tensor]  # of the last checkpoint, whole, by saved name
    state: RunState
    metrics: Metrics  # metrics.jsonl without clocks; a step's last line counts
    steps: dict[int, Step]

    @classmethod
    def read(cls, run: Path) -> "RunOutcome":
        folder = latest_checkpoint(run)
        assert folder is not None
        manifest = intact_manifest(folder)
        tensors = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
        CheckpointReader(folder, manifest, one_process=True).load(tensors)
        metrics = {
            (row["step"], name): value
            for row in read_log(run / METRICS)
            for name, value in row.items()
            if name not in _NOT_COMPARED
        }
        steps = {entry.step: entry for entry in read_step_log(run) if isinstance(entry, Step)}
        return cls(tensors, manifest.state, metrics, steps)


class Comparison(NamedTuple):
    """Lines for the report, and whether all is as it has to be."""

    lines: tuple[str, ...]
    passed: bool


class _Verdict(NamedTuple):
    """How one part of two outcomes compares: in words, and as what may be asked of it."""

    text: str
    equal: bool = False  # to the bit
    near: bool = False  # as near as sums in another order allow


def compare(reference: RunOutcome, disturbed: RunOutcome, *, exact: bool) -> Comparison:
    """Compare two outcomes to the bit, or samples to the bit and losses to 1e-4 of their value."""
    states = reference.state == disturbed.state
    # Among the counters are losses.
    near = reference.state.step == disturbed.state.step
    verdicts = {
        "weights": _tensors(reference, disturbed, of_weights=True),
        "optimizer and average": _tensors(reference, disturbed, of_weights=False),
        "counters": _Verdict("equal to the bit" if states else "differ", states, near),
        "metrics": _metrics(reference.metrics, disturbed.metrics),
        "samples and noise": _steps(reference.steps, disturbed.steps),
    }
    good = {title: verdict.equal if exact else verdict.near for title, verdict in verdicts.items()}
    lines = (
        f"{title:22}{verdict.text}{'' if good[title] else '   <-- must not be'}"
        for title, verdict in verdicts.items()
    )
    return Comparison(tuple(lines), all(good.values()))


def _tensors(reference: RunOutcome, disturbed: RunOutcome, *, of_weights: bool) -> _Verdict:
    ours, theirs = (
        {
            name: value
            for name, value in outcome.tensors.items()
            if name.startswith(f"{MODEL}.") == of_weights
        }
        for outcome in (reference, disturbed)
    )
    if missing := ours.keys() ^ theirs.keys():
        return _Verdict(f"differ in names: {sorted(missing)}")
    differing = [
        name
        for name in ours
        if not torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32))
    ]
    if not differing:
        return _Verdict(f"equal to the bit: {len(ours)} tensors", True, True)
    # Where a gradient is zero but for rounding (a bias of keys), AdamW makes whole steps of it:
    # only losses say what is near.
    apart = {
        name: float((ours[name] - theirs[name]).abs().max() / ours[name].abs().max())
        for name in differing
    }
    worst = max(apart, key=apart.__getitem__)
    text = (
        f"{len(differing)} of {len(ours)} tensors differ, the most by {apart[worst]:.1e} of its "
        f"largest value ({worst})"
    )
    return _Verdict(text, near=True)


def _metrics(ours: Metrics, theirs: Metrics) -> _Verdict:
    if missing := ours.keys() ^ theirs.keys():
        return _Verdict(f"{len(missing)} metrics are in one run only, first {min(missing)}")
    differing = [key for key in ours if ours[key] != theirs[key]]
    if not differing:
        return _Verdict(f"equal to the bit: {len(ours)} metrics", True, True)
    text = f"{len(differing)} of {len(ours)} metrics differ, first {min(differing)}; "
    apart = {key: _apart(ours[key], theirs[key]) for key in differing if key[1].endswith("/loss")}
    if not apart:
        return _Verdict(f"{text}no loss", near=True)
    worst = max(apart, key=apart.__getitem__)
    text += f"losses at most by {apart[worst]:.1e} of their value, {worst}"
    near = all(value <= _LARGEST_LOSS_DIFFERENCE for value in apart.values())
    return _Verdict(text, near=near)


def _apart(a: float | None, b: float | None) -> float:
    return math.inf if a is None or b is None else abs(a - b) / max(abs(a), 1e-30)


def _steps(ours: Mapping[int, Step], theirs: Mapping[int, Step]) -> _Verdict:
    used = [
        {(step, entry.rows, entry.digest) for step, entry in steps.items()}
        for steps in (ours, theirs)
    ]
    if differing := {step for step, _, _ in used[0] ^ used[1]}:
        return _Verdict(f"differ in {len(differing)} steps, first in {min(differing)}")
    return _Verdict(f"equal in {len(ours)} steps", True, True)

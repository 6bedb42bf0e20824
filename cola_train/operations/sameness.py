"""Whether two runs came to the same: every tensor, figure and sample, to the bit or nearly."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cola_train.files import read_log
from cola_train.run_layout import CLOCKS, METRICS
from cola_train.training.checkpoints.folder import intact_manifest, latest_checkpoint
from cola_train.training.checkpoints.tensors import CheckpointReader
from cola_train.training.loop.state import MODEL, RunState
from cola_train.training.loop.step_log import Step, read_step_log

_LARGEST_LOSS_DIFFERENCE = 1e-4
_NOT_COMPARED = CLOCKS | {"step"}


@dataclasses.dataclass(frozen=True)
class RunOutcome:
    """What a run came to."""

    tensors: dict[str, Tensor]  # of the last checkpoint, whole, by saved name
    state: RunState
    # metrics.jsonl by step and name, without clocks; a step's last line counts
    figures: dict[tuple[int, str], float | None]
    steps: dict[int, Step]

    @classmethod
    def read(cls, run: Path) -> "RunOutcome":
        """From its folder."""
        folder = latest_checkpoint(run)
        assert folder is not None
        manifest = intact_manifest(folder)
        tensors = {name: torch.empty(shape) for name, shape in manifest.shapes.items()}
        CheckpointReader(folder, manifest, one_process=True).load(tensors)
        figures: dict[tuple[int, str], float | None] = {}
        for row in read_log(run / METRICS):
            figures |= {
                (row["step"], name): value
                for name, value in row.items()
                if name not in _NOT_COMPARED
            }
        steps = {entry.step: entry for entry in read_step_log(run) if isinstance(entry, Step)}
        return cls(tensors, manifest.state, figures, steps)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Lines for the report, and whether all is as it has to be."""

    lines: tuple[str, ...]
    passed: bool


@dataclasses.dataclass(frozen=True)
class _Part:
    """One part of two endings in words: equal to the bit, or at least near enough where sums were
    made in another order.
    """

    text: str
    equal: bool
    near: bool


def compare(reference: RunOutcome, disturbed: RunOutcome, *, exact: bool) -> Comparison:
    """Hold two runs' endings against each other: to the bit, or else samples to the bit and losses
    to 1e-4 of their value.
    """
    states = reference.state == disturbed.state
    parts = {
        "weights": _tensors(reference.tensors, disturbed.tensors, of_weights=True),
        "optimizer and average": _tensors(reference.tensors, disturbed.tensors, of_weights=False),
        # Among the counters are losses.
        "counters": _Part(
            "equal to the bit" if states else "differ",
            states,
            reference.state.step == disturbed.state.step,
        ),
        "metrics": _figures(reference.figures, disturbed.figures),
        "samples and noise": _steps(reference.steps, disturbed.steps),
    }
    good = {title: part.equal if exact else part.near for title, part in parts.items()}
    lines = tuple(
        f"{title:22}{part.text}{'' if good[title] else '   <-- must not be'}"
        for title, part in parts.items()
    )
    return Comparison(lines, all(good.values()))


def _tensors(
    reference: Mapping[str, Tensor], disturbed: Mapping[str, Tensor], *, of_weights: bool
) -> _Part:
    ours, theirs = (
        {
            name: value
            for name, value in tensors.items()
            if name.startswith(f"{MODEL}.") == of_weights
        }
        for tensors in (reference, disturbed)
    )
    if ours.keys() != theirs.keys():
        return _Part(f"differ in names: {sorted(ours.keys() ^ theirs.keys())}", False, False)
    differing = [
        name
        for name in ours
        if not torch.equal(ours[name].view(torch.int32), theirs[name].view(torch.int32))
    ]
    if not differing:
        return _Part(f"equal to the bit: {len(ours)} tensors", True, True)
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
    return _Part(text, False, True)


def _figures(
    ours: Mapping[tuple[int, str], float | None], theirs: Mapping[tuple[int, str], float | None]
) -> _Part:
    missing = ours.keys() ^ theirs.keys()
    if missing:
        return _Part(
            f"{len(missing)} figures are in one run only, first {min(missing)}", False, False
        )
    differing = [key for key in ours if ours[key] != theirs[key]]
    if not differing:
        return _Part(f"equal to the bit: {len(ours)} figures", True, True)
    apart = {key: _apart(ours[key], theirs[key]) for key in differing if key[1].endswith("/loss")}
    worst = max(apart, key=apart.__getitem__, default=None)
    text = f"{len(differing)} of {len(ours)} figures differ, first {min(differing)}; "
    text += (
        "no loss"
        if worst is None
        else f"losses at most by {apart[worst]:.1e} of their value, {worst}"
    )
    return _Part(text, False, all(value <= _LARGEST_LOSS_DIFFERENCE for value in apart.values()))


def _apart(a: float | None, b: float | None) -> float:
    return math.inf if a is None or b is None else abs(a - b) / max(abs(a), 1e-30)


def _steps(ours: Mapping[int, Step], theirs: Mapping[int, Step]) -> _Part:
    used = [
        {step: (entry.rows, entry.digest) for step, entry in steps.items()}
        for steps in (ours, theirs)
    ]
    differing = [
        step for step in used[0].keys() | used[1].keys() if used[0].get(step) != used[1].get(step)
    ]
    if differing:
        return _Part(f"differ in {len(differing)} steps, first in {min(differing)}", False, False)
    return _Part(f"equal in {len(ours)} steps", True, True)

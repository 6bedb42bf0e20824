"""A bar over the work of many runs, read off what they write."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cola_train.config.run import RunConfig
from cola_train.console import only_warned
from cola_train.families.costs import flops_after
from cola_train.json_text import parse_json
from cola_train.run_layout import METRICS

if TYPE_CHECKING:
    from cola_train.scaling.children import Child

_TAIL_BYTES = 1 << 14


class ChildProgress:
    """Useful FLOPs that runs have spent, of all that they are to spend."""

    def __init__(self, folder: Path, bar: "tqdm[Any]") -> None:
        self._folder, self._bar = folder, bar

    def show(self, running: "Sequence[Child]", ended: "Sequence[Child]") -> None:
        """Move the bar: `ended` runs count as whole."""
        with only_warned("progress could not be shown"):
            spent = sum(_all_flops(run.config) for run in ended)
            steps = []
            for run in running:
                step, flops = _newest(self._folder / run.name / METRICS)
                spent += min(flops, _all_flops(run.config))
                steps.append(f"{run.name} {step}/{run.config.trainer.max_steps}")
            self._bar.set_postfix_str(", ".join(steps), refresh=False)
            self._bar.n = spent / 1e12
            self._bar.refresh()


@contextmanager
def child_progress(folder: Path, children: "Sequence[Child]") -> Iterator[ChildProgress]:
    """A bar for runs in `folder`, with their steps beside it."""
    total = sum(_all_flops(run.config) for run in children) / 1e12
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=total, desc="training", bar_format=form, disable=None) as bar:
        yield ChildProgress(folder, bar)


def _all_flops(config: RunConfig) -> int:
    return flops_after(config, config.trainer.max_steps)["model"]


def _newest(path: Path) -> tuple[int, int]:
    """The step and FLOPs of the newest whole line of metrics.jsonl that has them; 0 before."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return 0, 0
    for line in reversed(lines):
        try:
            row = parse_json(line.decode(errors="replace"))
            return int(row["step"]), round(float(row["eflops_model"]) * 1e18)
        except (ValueError, KeyError, TypeError):
            continue
    return 0, 0

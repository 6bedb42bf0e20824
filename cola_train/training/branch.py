"""A run that continues another's checkpoint to another end: same weights, state and samples.

So the constant phase of a warmup-stable-decay run is paid for once, and short anneals from its
checkpoints give several budgets.
"""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

from cola_train.checksums import sealed
from cola_train.config.load import load_config, to_yaml
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import atomic_folder
from cola_train.json_lines import json_lines, read_log
from cola_train.json_text import utf8
from cola_train.run_folder import read_run_config, saved_config
from cola_train.run_layout import CONFIG, METRICS, STEP_LOG, TOKENIZER, folder_of
from cola_train.training.checkpoints.folder import (
    MANIFEST,
    intact_manifest,
    point_to,
    saved_steps,
    step_folder,
)
from cola_train.training.optim.schedule import Schedule

# What a branch may have other than its trunk, beside what may change whenever a run resumes.
_MAY_DIFFER = (
    "name:",
    "branched_from:",
    "optim.schedule:",
    "optim.decay:",
    "optim.anneal:",
    "optim.final_learning_rate:",
)


def branch(source: Path, step: int | None, overrides: Sequence[str]) -> RunConfig:
    """Make the folder of a run that begins at a saved step of `source` (the last without `step`).

    A branch that exists already is left as it is. Its config, which is returned, is the source's
    with `overrides`.

    Raises:
        UserError: no such checkpoint; overrides that change what has been done already, the
            learning rate of a step among it.
    """
    trunk = read_run_config(source)
    steps = saved_steps(source)
    step = steps[-1] if step is None and steps else step
    if step is None or step not in steps:
        raise UserError(
            f"{source} has no checkpoint of step {step}; it has {steps}. budget.marks keeps "
            "checkpoints for good."
        )
    config = load_config(type(trunk), source / CONFIG, overrides)
    if config.runs_folder == trunk.runs_folder:
        # Beside its trunk, which may have been moved since it wrote that.
        config = dataclasses.replace(config, runs_folder=str(source.resolve().parent))
    config = dataclasses.replace(config, branched_from=f"{source}/step-{step}")
    others = [line for line in trunk.differences(config) if not line.startswith(_MAY_DIFFER)]
    require(
        not others,
        f"A branch of {source} cannot differ from it in {'; '.join(others)}; begin a run of its "
        "own (warm-start).",
    )
    _check_same_past(trunk, config, step)
    if saved_config(config) is None:
        _copy(source, step, config)
    return config


def _check_same_past(trunk: RunConfig, config: RunConfig, step: int) -> None:
    old, new = Schedule.of(trunk), Schedule.of(config)
    differing = next((past for past in range(step) if old.rate(past) != new.rate(past)), None)
    if differing is not None:
        raise UserError(
            f"The branch's learning rate is not that of the run it comes from at step {differing}, "
            f"before it branches off at step {step}: {new.rate(differing):.4g}, there "
            f"{old.rate(differing):.4g}. With optim.schedule=wsd begin the anneal later "
            f"(optim.decay {config.optim.decay!r} less optim.anneal {config.optim.anneal!r} must "
            f"not be below step {step})."
        )


def _copy(source: Path, step: int, config: RunConfig) -> None:
    folder = step_folder(source, step)
    # It is the trunk's mark, not the branch's.
    manifest = dataclasses.replace(intact_manifest(folder), mark=False)
    with atomic_folder(folder_of(config)) as working:
        copied = step_folder(working, step)
        shutil.copytree(folder, copied)
        (copied / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        point_to(copied)
        Tokenizer.load(source / TOKENIZER).save(working / TOKENIZER)
        (working / CONFIG).write_text(sealed(to_yaml(config)), encoding="utf-8")
        for name in (METRICS, STEP_LOG):
            rows = [
                row
                for row in read_log(source / name)
                # An attempt counts where it began.
                if row.get("step", row.get("attempt", {}).get("from_step", 0)) <= step
            ]
            (working / name).write_bytes(utf8(json_lines(rows)))

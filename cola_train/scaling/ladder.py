"""From a curve's spec to its runs: which there are, what each is launched with, and which must come
before which.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cola_train.config.amounts import FLOPS_PER_EFLOP, Amount
from cola_train.config.loop import Convention
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.families.costs import flops_after, steps_to
from cola_train.families.registry import family_of, family_of_file, load_run_config
from cola_train.scaling.config import CurveConfig, FamilyConfig

# A constant-rate run's learning rate never falls: its anneals are branches.
_NEVER = ("optim.decay=1000000000000", "optim.anneal=1")


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a ladder.

    Attributes:
        kind: "stage1"; "trunk", a constant-rate run that is no point itself; "anneal", a point that
            branches off one; "run", a point trained from its first step.
        arguments: of cola-train.
        budget: EFLOPs of a point, stage 1 included; 0 of what is no point.
        after: the run that must be finished before.
    """

    name: str
    kind: Literal["stage1", "trunk", "anneal", "run"]
    family: str
    size: str
    budget: float
    config: RunConfig
    arguments: tuple[str, ...]
    after: str | None

    @property
    def is_point(self) -> bool:
        """Whether it is measured."""
        return self.kind in ("anneal", "run")


def ladder(spec: CurveConfig, spec_folder: Path) -> list[PlannedRun]:
    """Every run of a spec, each after what it needs, small before large.

    Raises:
        UserError: a config that does not load, data order or data that differ between runs, a
            budget that stage 1 alone exceeds.
    """
    planned_runs: list[PlannedRun] = []
    for family_name, family in spec.families.items():
        stage1 = _stage1(spec, spec_folder, family_name, family)
        planned_runs += [] if stage1 is None else [stage1]
        for size, overrides in family.sizes.items():
            points = _cosine_runs if spec.schedule == "cosine" else _trunk_and_anneals
            planned_runs += points(
                spec, spec_folder / family.config, family_name, size, overrides, stage1
            )
    _check_alike(planned_runs)
    return planned_runs


def stage1_flops(planned: PlannedRun) -> dict[Convention, int]:
    """What a stage-1 run costs, by convention."""
    return flops_after(planned.config, planned.config.trainer.max_steps)


def _stage1(spec: CurveConfig, folder: Path, name: str, family: FamilyConfig) -> PlannedRun | None:
    if family.stage1 is None:
        return None
    run = f"{name}-stage1"
    settings = (f"name={run}", f"runs_folder={spec.folder}", *spec.settings)
    path = folder / family.stage1
    config = load_run_config(path, settings)
    return PlannedRun(
        run, "stage1", name, "", 0.0, config, (config.stage, str(path), *settings), None
    )


def _common(
    spec: CurveConfig, path: Path, overrides: Sequence[str], stage1: PlannedRun | None
) -> list[str]:
    common = [
        f"runs_folder={spec.folder}",
        f"budget.convention={spec.convention}",
        *spec.settings,
        *overrides,
    ]
    if stage1 is None:
        return common
    # By the file alone: without the start that is given here, its config may be refused.
    key = family_of_file(path).stage1_key
    require(
        key is not None,
        f"{path} is of a family that starts from no first stage; leave `stage1` out.",
    )
    return [*common, f"{key}={spec.folder}/{stage1.name}"]


def _left_of(spec: CurveConfig, budget: float, stage1: PlannedRun | None) -> int:
    """FLOPs that a budget leaves for the run itself."""
    whole = Amount.parse(f"{budget!r} EFLOPs", "budgets").count
    before = 0 if stage1 is None else stage1_flops(stage1)[spec.convention]
    require(
        whole > before,
        f"The budget of {budget:g} EFLOPs is used up by stage 1 ({stage1.name if stage1 else ''}), "
        f"which costs {before / FLOPS_PER_EFLOP:g} ({spec.convention}). Give larger budgets or "
        "train stage 1 for less.",
    )
    return whole - before


def _cosine_runs(
    spec: CurveConfig,
    path: Path,
    family: str,
    size: str,
    overrides: Sequence[str],
    stage1: PlannedRun | None,
) -> list[PlannedRun]:
    planned_runs = []
    for budget in sorted(spec.budgets):
        left = Amount(_left_of(spec, budget, stage1), "EFLOPs")
        name = f"{family}-{size}-{budget:g}"
        plain = [f"name={name}", *_common(spec, path, overrides, stage1)]
        steps = steps_to(load_run_config(path, plain), left)
        settings = [*plain, f"optim.decay={steps}", f"trainer.max_steps={steps}"]
        config = load_run_config(path, settings)
        after = stage1.name if stage1 else None
        planned_runs.append(
            PlannedRun(
                name,
                "run",
                family,
                size,
                budget,
                config,
                (config.stage, str(path), *settings),
                after,
            )
        )
    return planned_runs


def _trunk_and_anneals(
    spec: CurveConfig,
    path: Path,
    family: str,
    size: str,
    overrides: Sequence[str],
    stage1: PlannedRun | None,
) -> list[PlannedRun]:
    trunk = f"{family}-{size}-trunk"
    plain = [
        f"name={trunk}",
        *_common(spec, path, overrides, stage1),
        "optim.schedule=wsd",
        *_NEVER,
    ]
    config = load_run_config(path, plain)
    ends = [
        steps_to(config, Amount(_left_of(spec, budget, stage1), "EFLOPs"))
        for budget in sorted(spec.budgets)
    ]
    anneals = [max(1, round(spec.anneal_share * end)) for end in ends]
    begins = [end - anneal for end, anneal in zip(ends, anneals, strict=True)]
    if begins[0] < steps_to(config, Amount.parse(config.optim.warmup, "optim.warmup")) or len(
        set(begins)
    ) < len(begins):
        raise UserError(
            f"The budgets {sorted(spec.budgets)} are too small or too close for {family} {size}: "
            f"its anneals would begin at steps {begins}, which must differ and lie after warm-up "
            f"({config.optim.warmup!r})."
        )
    marks = ",".join(f"{step} steps" for step in begins)
    settings = [*plain, f"trainer.max_steps={begins[-1]}", f"budget.marks=[{marks}]"]
    after = stage1.name if stage1 else None
    config = load_run_config(path, settings)
    planned_runs = [
        PlannedRun(
            trunk, "trunk", family, size, 0.0, config, (config.stage, str(path), *settings), after
        )
    ]
    for budget, begin, anneal, end in zip(sorted(spec.budgets), begins, anneals, ends, strict=True):
        name = f"{family}-{size}-{budget:g}"
        changes = [
            f"name={name}",
            f"optim.decay={end}",
            f"optim.anneal={anneal}",
            f"trainer.max_steps={end}",
            "budget.marks=[]",
        ]
        annealed = load_run_config(path, [*settings, *changes])
        arguments = ("branch", f"{spec.folder}/{trunk}", "--step", str(begin), *changes)
        planned_runs.append(
            PlannedRun(name, "anneal", family, size, budget, annealed, arguments, trunk)
        )
    return planned_runs


def _check_alike(planned_runs: Sequence[PlannedRun]) -> None:
    """All runs must read the same rows in the same order: what differs is the model alone."""
    first = planned_runs[0]
    for planned in planned_runs[1:]:
        for key, ours, theirs in (
            ("data.path", first.config.data.path, planned.config.data.path),
            ("data.seq_len", first.config.data.seq_len, planned.config.data.seq_len),
            ("data_seed", first.config.data_seed, planned.config.data_seed),
        ):
            require(
                ours == theirs,
                f"A curve compares runs on the same data in the same order, but {key} is {ours!r} "
                f"in {first.name} and {theirs!r} in {planned.name}. Set it for all under "
                "`settings`.",
            )
    for planned in planned_runs:
        start = family_of(planned.config).uncounted_start(planned.config)
        require(
            start is None or planned.after is not None,
            f"{planned.name} starts from {start}, whose cost no budget counts; "
            "give its config as `stage1` of the family.",
        )

"""From a curve's spec to its runs: what each is launched with, and which one it needs before it."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cola_train.config.amounts import FLOPS_PER_EFLOP, Amount
from cola_train.config.load import value_at
from cola_train.config.loop import Convention
from cola_train.config.run import RunConfig
from cola_train.config.settings import require
from cola_train.families.costs import flops_after, steps_to
from cola_train.families.registry import family_of, family_of_file, load_run_config
from cola_train.scaling.children import Child
from cola_train.scaling.config import CurveConfig

# A trunk is a constant-rate run that is no point itself, an anneal a point that branches off one, a
# run a point trained from its first step.
Kind = Literal["stage1", "trunk", "anneal", "run"]
# A constant-rate run's learning rate never falls: its anneals are branches.
_NEVER = ("optim.decay=1000000000000", "optim.anneal=1")


@dataclasses.dataclass(frozen=True)
class PlannedRun(Child):
    """One run of a ladder."""

    kind: Kind
    family: str
    size: str
    budget: float  # EFLOPs of a point, stage 1 included; 0 for other kinds

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
    for name, family in spec.families.items():
        stage1 = None
        if family.stage1 is not None:
            settings = [f"name={name}-stage1", f"runs_folder={spec.folder}", *spec.settings]
            first = _Model(spec, spec_folder / family.stage1, name, "", [], None)
            stage1 = first.run(f"{name}-stage1", "stage1", 0.0, settings)
            planned_runs.append(stage1)
        for size, overrides in family.sizes.items():
            model = _Model(spec, spec_folder / family.config, name, size, overrides, stage1)
            runs_of = _cosine_runs if spec.schedule == "cosine" else _trunk_and_anneals
            planned_runs += runs_of(model)
    _check_alike(planned_runs)
    return planned_runs


def stage1_flops(planned: PlannedRun) -> dict[Convention, int]:
    """What a stage-1 run costs, by convention."""
    return flops_after(planned.config, planned.config.trainer.max_steps)


@dataclasses.dataclass(frozen=True)
class _Model:
    """One size of a family: its config's file, overrides, and the stage 1 that it starts from."""

    spec: CurveConfig
    path: Path
    family: str
    size: str
    overrides: Sequence[str]
    stage1: PlannedRun | None

    def settings(self) -> list[str]:
        """The settings of all its runs."""
        spec = self.spec
        common = [f"runs_folder={spec.folder}", f"budget.convention={spec.convention}"]
        common += [*spec.settings, *self.overrides]
        if self.stage1 is None:
            return common
        # By the file alone: without the start that is given here, its config may be refused.
        key = family_of_file(self.path).stage1_key
        require(
            key is not None,
            f"{self.path} is of a family that starts from no first stage; leave `stage1` out.",
        )
        return [*common, f"{key}={spec.folder}/{self.stage1.name}"]

    def ends(self, config: RunConfig) -> dict[float, int]:
        """The last step for each budget, rising; `config` is of any of the runs."""
        before = 0 if self.stage1 is None else stage1_flops(self.stage1)[self.spec.convention]
        ends = {}
        for budget in sorted(self.spec.budgets):
            whole = Amount.of_eflops(budget).count
            require(
                whole > before,
                f"The budget of {budget:g} EFLOPs is used up by stage 1 ({self.family}-stage1), "
                f"which costs {before / FLOPS_PER_EFLOP:g} ({self.spec.convention}). Give larger "
                "budgets or train stage 1 for less.",
            )
            ends[budget] = steps_to(config, Amount(whole - before, "EFLOPs"))
        return ends

    def run(self, name: str, kind: Kind, budget: float, settings: Sequence[str]) -> PlannedRun:
        """A run from its first step."""
        config = load_run_config(self.path, settings)
        arguments = (config.stage, str(self.path), *settings)
        after = () if self.stage1 is None else (self.stage1.name,)
        return PlannedRun(name, config, arguments, after, kind, self.family, self.size, budget)


def _cosine_runs(model: _Model) -> list[PlannedRun]:
    planned_runs, common = [], model.settings()
    config = load_run_config(model.path, [f"name={model.family}-{model.size}", *common])
    for budget, end in model.ends(config).items():
        name = f"{model.family}-{model.size}-{budget:g}"
        settings = [f"name={name}", *common, f"optim.decay={end}", f"trainer.max_steps={end}"]
        planned_runs.append(model.run(name, "run", budget, settings))
    return planned_runs


def _trunk_and_anneals(model: _Model) -> list[PlannedRun]:
    spec = model.spec
    trunk = f"{model.family}-{model.size}-trunk"
    plain = [f"name={trunk}", *model.settings(), "optim.schedule=wsd", *_NEVER]
    config = load_run_config(model.path, plain)
    ends = model.ends(config)
    begins = [end - max(1, round(spec.anneal_share * end)) for end in ends.values()]
    warmup = steps_to(config, Amount.parse(config.optim.warmup, "optim.warmup"))
    require(
        begins[0] >= warmup and len(set(begins)) == len(begins),
        f"The budgets {list(ends)} are too small or too close for {model.family} {model.size}: "
        f"its anneals would begin at steps {begins}, which must differ and lie after warm-up "
        f"({config.optim.warmup!r}).",
    )
    marks = ",".join(f"{step} steps" for step in begins)
    settings = [*plain, f"trainer.max_steps={begins[-1]}", f"budget.marks=[{marks}]"]
    planned_runs = [model.run(trunk, "trunk", 0.0, settings)]
    for (budget, end), begin in zip(ends.items(), begins, strict=True):
        name = f"{model.family}-{model.size}-{budget:g}"
        changes = [
            f"name={name}",
            f"optim.decay={end}",
            f"optim.anneal={end - begin}",
            f"trainer.max_steps={end}",
            "budget.marks=[]",
        ]
        annealed = load_run_config(model.path, [*settings, *changes])
        arguments = ("branch", f"{spec.folder}/{trunk}", "--step", str(begin), *changes)
        of = (model.family, model.size, budget)
        planned_runs.append(PlannedRun(name, annealed, arguments, (trunk,), "anneal", *of))
    return planned_runs


def _check_alike(planned_runs: Sequence[PlannedRun]) -> None:
    """Refuse runs that do not read the same rows in the same order."""
    first = planned_runs[0]
    for planned in planned_runs[1:]:
        for key in ("data.path", "data.seq_len", "data_seed"):
            ours, theirs = value_at(first.config, key), value_at(planned.config, key)
            require(
                ours == theirs,
                f"A curve compares runs on the same data in the same order, but {key} is {ours!r} "
                f"in {first.name} and {theirs!r} in {planned.name}. Set it for all under "
                "`settings`.",
            )
    for planned in planned_runs:
        start = family_of(planned.config).uncounted_start(planned.config)
        require(
            start is None or len(planned.after) > 0,
            f"{planned.name} starts from {start}, whose cost no budget counts; "
            "give its config as `stage1` of the family.",
        )

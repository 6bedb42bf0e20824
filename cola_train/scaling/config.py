"""Settings of scaling curves: a ladder of families, sizes and budgets."""

import dataclasses
import math
from typing import Literal

from cola_train.config.loop import Convention
from cola_train.config.settings import BETWEEN_0_AND_1, Rule, Settings, require, section, setting
from cola_train.evaluation.writing.config import ComparisonConfig

_BUDGETS = Rule(
    "different numbers of EFLOPs above 0",
    lambda budgets: (
        len(budgets) > 0
        and len(set(budgets)) == len(budgets)
        and all(0 < budget < math.inf for budget in budgets)
    ),
)


@dataclasses.dataclass(frozen=True)
class FamilyConfig(Settings):
    """One family of models."""

    config: str = setting(
        "???", help="Its run config; relative names start from the spec's folder.", common=True
    )
    sizes: dict[str, list[str]] = setting(
        {}, help="By name, what makes each size: key=value overrides of that config.", common=True
    )
    stage1: str | None = setting(
        None,
        help=(
            "Cola DLM: the run config of stage 1, trained once, before; what it costs is part of "
            "each of its budgets."
        ),
        common=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.sizes) > 0,
            "A family needs at least one size, such as sizes: {small: [dit.num_layers=2]}.",
        )


@dataclasses.dataclass(frozen=True)
class CurveConfig(Settings):
    """`cola-train curve`: every family in every size at every budget."""

    folder: str = setting(
        help="Where the ladder's runs, points.csv, fit.json and figures go.", common=True
    )
    families: dict[str, FamilyConfig] = setting(
        {}, help="By name: cola, ar, llada or any other.", common=True
    )
    budgets: list[float] = setting(
        [],
        help="EFLOPs at which each size is measured, counted by `convention`, stage 1 included.",
        common=True,
        rule=_BUDGETS,
    )
    convention: Convention = setting(
        "model", help="How budgets are counted, see budget.convention.", common=True
    )
    schedule: Literal["cosine", "wsd"] = setting(
        "wsd",
        help=(
            "wsd: one run a size at a constant rate, and an anneal from it for each budget; "
            "cosine: a run for each budget."
        ),
        common=True,
    )
    anneal_share: float = setting(
        0.2,
        help="wsd: the share of a budget's steps in which the learning rate falls.",
        common=True,
        rule=BETWEEN_0_AND_1,
    )
    settings: list[str] = setting(
        [], help="key=value overrides of every run, stage 1 included.", common=True
    )
    comparison: ComparisonConfig = section(
        ComparisonConfig, help="What is measured at each point.", common=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.families) > 0, "A curve needs families, each with its config and sizes.")
        sizes = [size for family in self.families.values() for size in family.sizes]
        for name in [*self.families, *sizes]:
            require(
                name.replace("_", "").replace("-", "").replace(".", "").isalnum(),
                "Names of families and sizes become folders: letters, digits, '.', '_' and '-', "
                f"not {name!r}.",
            )

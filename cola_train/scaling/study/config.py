"""Settings of studies: a run config, and named trials that change it."""

import dataclasses

from cola_train.config.evaluation import InspectionConfig
from cola_train.config.settings import (
    NOT_EMPTY,
    Rule,
    Settings,
    nearest,
    require,
    section,
    setting,
)
from cola_train.evaluation.writing.config import ComparisonConfig

COMPARISON = "comparison/"
SEED_PLACEHOLDER = "seed"
_SEEDS = Rule(
    "different seeds in [0, 2^63)",
    lambda seeds: len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds),
)
_OWN = ("name", "runs_folder", "seed")  # what a study gives its runs


@dataclasses.dataclass(frozen=True)
class TrialConfig(Settings):
    """One trial."""

    why: str = setting("", help="What it is to find out; stands in the table.", common=True)
    settings: list[str] = setting(
        [],
        help="key=value overrides, over `settings` of the study; {NAME} in them is the run folder "
        "of trial NAME, which is trained before, {seed} the seed.",
        common=True,
    )
    config: str | None = setting(
        None, help="Another run config than the study's, of any family; null is the study's."
    )
    seeds: list[int] = setting(
        [], help="A run for each; none are the study's.", common=True, rule=_SEEDS
    )
    comparisons: list[str] | None = setting(
        None,
        help="Names of the comparisons that judge it; null is all. Not every family has each of "
        "the sampler's settings.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_overrides(self.settings)


@dataclasses.dataclass(frozen=True)
class StudyConfig(Settings):
    """`cola-train study`: named trials of a run config, trained, measured and compared."""

    folder: str = setting(
        help="Where its runs, results.jsonl, table.md and table.csv go.", common=True
    )
    config: str = setting(
        help="The run config, of any family, that trials change; relative names start from the "
        "spec's folder.",
        common=True,
    )
    settings: list[str] = setting([], help="key=value overrides of every trial.", common=True)
    seeds: list[int] = setting([66], help="A run of each trial for each.", common=True, rule=_SEEDS)
    trials: dict[str, TrialConfig] = setting(
        {}, help="By name; the first one is what the others are compared with.", common=True
    )
    inspection: InspectionConfig = section(
        InspectionConfig,
        help="As of `cola-train inspect`, for families with latents.",
        common=False,
    )
    inspection_data: str | None = setting(
        None, help="Prepared data to inspect on; null is each run's own."
    )
    comparisons: dict[str, ComparisonConfig] = setting(
        {},
        help="By name, settings of `cola-train compare`; each judges every trial that writes text.",
        common=False,
    )
    columns: list[str] = setting(
        [
            "flow_mse",
            "flow_minus_unigram",
            "flow_minus_bigram",
            f"{COMPARISON}judge_nats_per_byte",
            f"{COMPARISON}distinct_4word_share",
        ],
        help="Figures in the table, by their names in metrics.jsonl and inspection.json; "
        "comparison/FIGURE stands for it in each comparison, comparison/NAME/FIGURE in one.",
        rule=NOT_EMPTY,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.seeds) > 0, "A study needs at least one seed, such as seeds: [66].")
        require(
            len(self.trials) > 0,
            "A study needs trials, such as trials: {base: {why: the recipe}}.",
        )
        _check_overrides(self.settings)
        for name in self.trials:
            _check_name(name, "trials become folders")
            require(
                name != SEED_PLACEHOLDER,
                "No trial may be named 'seed': {seed} in settings stands for a run's seed.",
            )
        for name in self.comparisons:
            _check_name(name, "comparisons become parts of figures' names")
        for trial, config in self.trials.items():
            for name in config.comparisons or []:
                require(
                    name in self.comparisons,
                    f"trials.{trial}.comparisons has {name!r}, and there is no such comparison; "
                    f"{nearest(name, self.comparisons)}",
                )


def _check_name(name: str, because: str) -> None:
    plain = name.replace("_", "").replace("-", "").replace(".", "")
    require(
        plain.isalnum() and plain.isascii(),
        f"Names of {because}: letters, digits, '.', '_' and '-', not {name!r}.",
    )


def _check_overrides(settings: list[str]) -> None:
    for text in settings:
        key = text.partition("=")[0]
        require(
            key not in _OWN,
            f"{text!r}: a study gives its runs {', '.join(_OWN)} itself; name trials under "
            "`trials` and give their `seeds`.",
        )

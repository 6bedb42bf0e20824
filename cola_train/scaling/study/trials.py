"""From a study's spec to its runs: what each is launched with, needs before it, and is made of."""

import dataclasses
import graphlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.load import leaves, value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, nearest, require
from cola_train.families.registry import load_run_config
from cola_train.json_text import parse_json
from cola_train.scaling.children import Child
from cola_train.scaling.study.config import SEED_PLACEHOLDER, StudyConfig, TrialConfig

_PLACEHOLDER = re.compile(r"\{([\w.-]+)\}")
# What a trained network does not depend on. The seed stands beside.
_PLAYS_NO_PART = (
    "name",
    "runs_folder",
    "seed",
    "stage",
    "data.num_workers",
    "checkpoint.",
    "in_loop_eval.",
    "alarms.",
    "wandb.",
    "trainer.log_every_steps",
    "trainer.sample_every_steps",
    "trainer.sample_prompts",
    "trainer.validate_every_steps",
    "trainer.validation_rows",
)


@dataclasses.dataclass(frozen=True)
class TrialRun(Child):
    """One trial with one seed."""

    trial: str
    seed: int
    # As JSON: what the result depends on (family, seed, settings that are not the defaults), and
    # under `starts` the same of each run that it starts from. Where this is equal, so is the run.
    made_of: dict[str, Any]


def trial_runs(spec: StudyConfig, spec_folder: Path) -> list[TrialRun]:
    """Every run of a spec, each after those that it needs, otherwise in the spec's order.

    Raises:
        UserError: a config that does not load, a placeholder of no trial, trials that start from
            each other, two trials that are equal.
    """
    trials = _Trials(spec, spec_folder)
    known: dict[str, str] = {}
    for name in spec.trials:
        same = json.dumps(trials.made_of(name, spec.seeds[0]), sort_keys=True)
        other = known.setdefault(same, name)
        require(
            other == name,
            f"The trials {other} and {name} are equal: their runs have the same settings. Change "
            "one of them, or give more `seeds` to one.",
        )
    return [trials.run(name, seed) for name in trials.order for seed in trials.seeds(name)]


class _Trials:
    """A spec's trials, as they refer to each other."""

    def __init__(self, spec: StudyConfig, spec_folder: Path) -> None:
        self.spec, self.spec_folder = spec, spec_folder
        names = {*spec.trials, SEED_PLACEHOLDER}
        for name, trial in spec.trials.items():
            for used in self._used(trial):
                require(
                    used in names,
                    f"Trial {name} has {{{used}}} in its settings, and there is no trial {used!r}; "
                    f"{nearest(used, names)}",
                )
        needs = {name: self._starts(trial) for name, trial in spec.trials.items()}
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise UserError(f"Trials start from each other in a circle: {circle}.") from None
        self.order: list[str] = []
        for name in spec.trials:
            self._put(name)

    def _put(self, name: str) -> None:
        """Put a trial behind those that it starts from, unless it has its place."""
        if name not in self.order:
            for used in self._starts(self.spec.trials[name]):
                self._put(used)
            self.order.append(name)

    def seeds(self, name: str) -> list[int]:
        """The seeds that a trial runs with."""
        return self.spec.trials[name].seeds or self.spec.seeds

    def run(self, name: str, seed: int) -> TrialRun:
        """The run of a trial with a seed."""
        before = self._runs_before(name, seed)
        folders = {used: f"{self.spec.folder}/{run_name(used, its)}" for used, its in before}
        folder_name = run_name(name, seed)
        settings = [
            *self._filled(name, {**folders, SEED_PLACEHOLDER: str(seed)}),
            f"name={folder_name}",
            f"runs_folder={self.spec.folder}",
            f"seed={seed}",
        ]
        config = self._load(name, settings)
        return TrialRun(
            name=folder_name,
            config=config,
            arguments=(config.stage, str(self._path(name)), *settings),
            after=tuple(run_name(used, its) for used, its in before),
            trial=name,
            seed=seed,
            made_of=self.made_of(name, seed),
        )

    def made_of(self, name: str, seed: int) -> dict[str, Any]:
        """`TrialRun.made_of`; placeholders of trials stay in the settings as they are written."""
        settings = [*self._filled(name, {SEED_PLACEHOLDER: str(seed)}), "name=any"]
        config = self._load(name, settings)
        starts = {used: self.made_of(used, its) for used, its in self._runs_before(name, seed)}
        found = {
            "family": config.stage,
            "seed": seed,
            "settings": settings_of(config),
            "starts": starts,
        }
        return dict(parse_json(json.dumps(found)))

    def _runs_before(self, name: str, seed: int) -> list[tuple[str, int]]:
        # The same seed where that trial has it, so that seeds differ in all that came before.
        return [
            (used, seed if seed in self.seeds(used) else self.seeds(used)[0])
            for used in self._starts(self.spec.trials[name])
        ]

    def _starts(self, trial: TrialConfig) -> list[str]:
        return [used for used in dict.fromkeys(self._used(trial)) if used != SEED_PLACEHOLDER]

    def _used(self, trial: TrialConfig) -> Iterator[str]:
        for text in (*self.spec.settings, *trial.settings):
            yield from _PLACEHOLDER.findall(text)

    def _filled(self, name: str, values: Mapping[str, str]) -> list[str]:
        return [
            _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
            for text in (*self.spec.settings, *self.spec.trials[name].settings)
        ]

    def _path(self, name: str) -> Path:
        return self.spec_folder / (self.spec.trials[name].config or self.spec.config)

    def _load(self, name: str, settings: list[str]) -> RunConfig:
        try:
            return load_run_config(self._path(name), settings)
        except UserError as error:
            raise UserError(f"Trial {name}: {error}") from None


def run_name(trial: str, seed: int) -> str:
    """The name of a run's folder."""
    return f"{trial}-{seed}"


def settings_of(config: RunConfig) -> dict[str, Any]:
    """What a trained network depends on but the seed: settings that are not the defaults."""
    return {
        key: value_at(config, key)
        for key, field in leaves(type(config))
        if not key.startswith(_PLAYS_NO_PART) and value_at(config, key) != _default(field)
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default

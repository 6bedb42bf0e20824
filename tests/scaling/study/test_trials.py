"""From a spec to runs: what is trained, after what, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from cola_train.config.settings import UserError
from cola_train.families.registry import load_run_config
from cola_train.scaling.children import levels
from tests.scaling.study.specs import read, write_study


def trials(**changes: dict[str, object]) -> dict[str, object]:
    return {"trials": {"base": {"settings": ["init_vae_from=v"]}, **changes}}


def test_a_trial_is_a_command_that_a_user_could_type(tmp_path: Path) -> None:
    spec, runs = read(write_study(tmp_path, "data"))
    for run in runs:
        verb, config, *settings = run.arguments
        assert load_run_config(Path(config), settings) == run.config
        assert (verb, run.name) == (run.config.stage, f"{run.trial}-{run.seed}")
        assert (run.config.name, run.config.seed) == (run.name, run.seed)
        assert run.config.runs_folder == spec.folder
        assert run.config.trainer.max_steps == 2
    assert [run.config.stage for run in runs] == ["vae", "joint", "joint", "joint", "ar"]


def test_trials_come_behind_those_that_they_start_from(tmp_path: Path) -> None:
    spec, runs = read(write_study(tmp_path, "data"))
    assert [run.name for run in runs] == ["first-66", "base-66", "loc-66", "loc-67", "ar-66"]
    # Seed 67 of `loc` has no run of `first` with its seed, and takes the first there is.
    assert [run.after for run in runs] == [(), *[("first-66",)] * 3, ()]
    assert {getattr(run.config, "init_vae_from", None) for run in runs} == {
        None,
        f"{spec.folder}/first-66",
    }
    assert [[run.name for run in level] for level in levels(runs)] == [
        ["first-66", "ar-66"],
        ["base-66", "loc-66", "loc-67"],
    ]


def test_a_trial_starts_from_the_run_of_its_seed_and_may_use_it(tmp_path: Path) -> None:
    changed = {
        "settings": ["data.path=d", "data_seed={seed}"],
        "seeds": [1, 2],
        "trials": {
            "base": {"settings": ["init_vae_from={first}"]},
            "first": {"config": "vae.yaml"},
        },
    }
    _, runs = read(write_study(tmp_path, "data", **changed))
    assert [(run.name, run.after, run.config.data_seed) for run in runs] == [
        ("first-1", (), 1),
        ("first-2", (), 2),
        ("base-1", ("first-1",), 1),
        ("base-2", ("first-2",), 2),
    ]


def test_what_a_run_is_made_of_is_all_that_its_result_depends_on(tmp_path: Path) -> None:
    def made_of(name: str, **changes: object) -> object:
        _, runs = read(write_study(tmp_path, "data", **changes))
        return next(run.made_of for run in runs if run.name == name)

    shared = ["data.path=data", "trainer.max_steps=2", "trainer.validate_every_steps=2"]
    before = made_of("base-66", settings=shared)
    same = [*shared, "checkpoint.every_steps=7", "trainer.log_every_steps=2"]
    assert made_of("base-66", settings=same) == before
    moved = made_of("base-66", settings=shared, folder=str(tmp_path / "elsewhere"))
    assert moved == before
    assert made_of("base-66", settings=[*shared, "optim.beta1=0.5"]) != before
    assert made_of("base-66", settings=["data.path=other", *shared[1:]]) != before
    # What it starts from is a part of it, whatever the folder is called.
    others = {
        "base": {"settings": ["init_vae_from={first}"]},
        "first": {"config": "vae.yaml", "settings": ["vae.dim=8"]},
    }
    assert made_of("base-66", settings=shared, trials=others) != before


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trials": {}}, "A study needs trials"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, r"seeds must be different seeds in \[0, 2\^63\), not \[1, 1\]"),
        ({"config": "none.yaml"}, "Trial base: There is no config file"),
        (trials(**{"a/b": {}}), "trials become folders.*not 'a/b'"),
        (trials(**{"": {}}), "trials become folders.*not ''"),
        (trials(seed={}), "No trial may be named 'seed'"),
        ({"comparisons": {"a/b": {}}}, "not 'a/b'"),
        (
            trials(x={"comparisons": ["unguide"]}),
            "trials.x.comparisons has 'unguide', .* did you mean 'unguided'",
        ),
        (trials(x={"settings": ["name=y"]}), "'name=y': a study gives its runs name"),
        (trials(x={"settings": ["seed=7"]}), "give their `seeds`"),
        (
            trials(x={"settings": ["init_vae_from={bas}"]}),
            "Trial x has {bas} in its settings, and there is no trial 'bas'; did you mean 'base'",
        ),
        (
            trials(x={"settings": ["init_vae_from={y}"]}, y={"settings": ["init_vae_from={x}"]}),
            "in a circle: [xy] -> [xy] -> [xy]",
        ),
        (
            trials(x={"settings": ["init_vae_from=v", "optim.beta=1"]}),
            "Trial x: Unknown config key 'optim.beta'",
        ),
        (
            trials(x={"settings": ["init_vae_from=v", "checkpoint.every_steps=9"], "seeds": [5]}),
            "The trials base and x are equal",
        ),
        ({"trials": {"base": {"setings": []}}}, "Unknown config key 'trials.base.setings'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read(write_study(tmp_path, "data", **changes))


def test_a_runs_name_says_which_trial_and_seed(tmp_path: Path) -> None:
    several = {"a": {}, "a-1": {"settings": ["init_vae_from=w"]}}
    changed = {
        "trials": {"base": {"settings": ["init_vae_from=v"]}, **several},
        "seeds": [1, 11, 2],
    }
    spec = write_study(tmp_path, "data", **changed)
    _, runs = read(spec)
    assert len({run.name for run in runs}) == len(runs) == 9
    assert all(dataclasses.replace(run.config, name=run.name) == run.config for run in runs)

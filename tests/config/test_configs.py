"""Every file of configs/ loads and builds; the paper's and their ablations have the paper's
parameter counts.
"""

import re
from pathlib import Path

import pytest
import torch
import yaml

from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.families.cola.config import ColaRunConfig, JointRunConfig
from cola_train.families.registry import family_of, load_run_config
from cola_train.families.transformer.family import BaselineRunConfig
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.study.config import StudyConfig
from cola_train.scaling.study.trials import trial_runs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ALL = sorted(CONFIGS.rglob("*.yaml"))
# What a file is for is what its first line says: the command that runs it.
COMMANDS = {
    path: first.removeprefix("# cola-train ").split()
    for path in ALL
    if (first := path.read_text(encoding="utf-8").partition("\n")[0]).startswith("# cola-train ")
}
VERBS = ("vae", "joint", "distill", "ar", "llada")
RUNS = [path for path, command in COMMANDS.items() if command[0] in VERBS]
PAPER_VAE, PAPER_DIT = 501_871_574, 1_829_875_728
PAPER_BASELINE, PAPER_EMBEDDINGS = 1_812_051_968, 410_738_688


def load(path: Path) -> RunConfig:
    return load_run_config(path)


def base_of(path: Path) -> Path | None:
    base = yaml.safe_load(path.read_text(encoding="utf-8")).get("base")
    return None if base is None else (path.parent / base).resolve()


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_of_a_run_builds(path: Path) -> None:
    config = load(path)
    assert config.name == (f"{path.stem}_paper" if path.parent.name == "paper" else path.stem)
    assert COMMANDS[path][0] == config.stage  # type: ignore[attr-defined]  # each verb's has one
    if config.stage == "distill":  # type: ignore[attr-defined]
        return  # how large its teacher is only a checkpoint says
    with torch.device("meta"):
        objective = family_of(config).build(config)
    if path.parent.name == "small":
        return
    if isinstance(config, ColaRunConfig):
        assert count(objective.get_submodule("vae")) == PAPER_VAE
    if isinstance(config, JointRunConfig):
        assert count(objective.get_submodule("dit")) == PAPER_DIT
    if isinstance(config, BaselineRunConfig):
        embeddings = sum(
            count(objective.get_submodule(f"transformer.{name}"))
            for name in ("model.embed_tokens", "lm_head")
        )
        # LLaDA's input has a row for [mask].
        assert embeddings == PAPER_EMBEDDINGS + (2048 if config.stage == "llada" else 0)  # type: ignore[attr-defined]
        assert count(objective) - embeddings == PAPER_BASELINE


def test_all_inherit_from_one_base() -> None:
    for path in RUNS:
        seen = path
        while (base := base_of(seen)) is not None:
            seen = base
        assert seen == CONFIGS / "base.yaml", path


def test_the_strategies_of_the_paper_are_what_they_say() -> None:
    names = ("fix", "x1", "x0.01", "all_scratch", "interval")
    strategies = {name: load(CONFIGS / "ablations" / f"joint_{name}.yaml") for name in names}
    modes = {name: config.objective.vae_strategy.mode for name, config in strategies.items()}  # type: ignore[attr-defined]
    assert modes == {
        "fix": "fix",
        "x1": "joint",
        "x0.01": "joint",
        "all_scratch": "joint",
        "interval": "interval",
    }
    assert strategies["x0.01"].objective.vae_strategy.learning_rate_factor == 0.01  # type: ignore[attr-defined]
    assert strategies["all_scratch"].init_vae_from is None  # type: ignore[attr-defined]


def test_every_other_file_loads_or_is_a_base() -> None:
    inherited = {base_of(path) for path in ALL}
    assert len(RUNS) > 20
    for path in set(ALL) - set(RUNS):
        if path not in COMMANDS:
            assert path in inherited, (
                f"{path} neither opens with a command nor is the base of another"
            )
        elif COMMANDS[path][:2] == ["curve", "run"]:
            config = load_config(CurveConfig, path)
            for name in {
                name
                for family in config.families.values()
                for name in (family.config, family.stage1)
                if name
            }:
                assert path.parent / name in RUNS
        elif COMMANDS[path][:2] == ["study", "run"]:
            study = load_config(StudyConfig, path)
            assert len(trial_runs(study, path.parent)) >= len(study.trials) > 1
        else:
            assert COMMANDS[path][0] == "compare"
            assert load_config(ComparisonConfig, path).sampler.num_steps >= 1


def test_a_file_opens_with_the_command_that_runs_it() -> None:
    assert {
        path
        for path in ALL
        if path.stem in ("base", "cola", "quickstart", "austen", "bench", "dyck")
    } == set(ALL) - set(COMMANDS)
    for path, command in COMMANDS.items():
        assert command[-1] == path.relative_to(CONFIGS.parent).as_posix()


def test_the_readme_has_a_line_for_every_file() -> None:
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[[^]]*\]\(([^)]*)\) \| .", text, flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(CONFIGS).as_posix() for path in ALL)

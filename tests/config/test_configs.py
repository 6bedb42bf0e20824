"""Every file of configs/ loads and builds; the paper's have the paper's parameter counts."""

from pathlib import Path

import pytest
import torch
import yaml

from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.families.cola.config import ColaRunConfig, JointRunConfig
from cola_train.families.registry import load_run_config
from cola_train.families.transformer.config import BaselineRunConfig
from cola_train.processes import Processes
from cola_train.training.loop.interrupts import StopRequest
from cola_train.families.registry import family_of
from cola_train.training.loop.watchdog import Watchdog

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name.startswith(("vae_", "joint_", "ar_", "llada_")))
PAPER_VAE, PAPER_DIT = 501_871_574, 1_829_875_728
PAPER_BASELINE, PAPER_EMBEDDINGS = 1_812_051_968, 410_738_688


def load(path: Path) -> RunConfig:
    return load_run_config(path)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_builds_and_opens_with_the_command_that_runs_it(path: Path) -> None:
    verb = path.name.split("_")[0]
    assert path.read_text(encoding="utf-8").startswith(f"# cola-train {verb} configs/{path.name}\n")
    config = load(path)
    assert config.name == path.stem or "quickstart" in path.stem or "smoke" in path.stem
    processes, stop = Processes(0, 1, 0, 1), StopRequest()
    with torch.device("meta"):
        objective = build_stage(config, processes=processes, stop=stop, watchdog=Watchdog(0, 1)).build_objective()
    if "quickstart" in path.stem or "smoke" in path.stem or "austen" in path.stem:
        return
    if isinstance(config, ColaRunConfig):
        assert count(objective.get_submodule("vae")) == PAPER_VAE
    if isinstance(config, JointRunConfig):
        assert count(objective.get_submodule("dit")) == PAPER_DIT
    if isinstance(config, BaselineRunConfig):
        embeddings = sum(count(objective.get_submodule(f"transformer.{name}")) for name in ("model.embed_tokens", "lm_head"))
        # LLaDA's input has a row for [mask].
        assert embeddings == PAPER_EMBEDDINGS + (2048 if config.stage == "llada" else 0)  # type: ignore[attr-defined]
        assert count(objective) - embeddings == PAPER_BASELINE


def test_all_inherit_from_one_base() -> None:
    for path in RUNS:
        seen = path
        while (base := yaml.safe_load(seen.read_text(encoding="utf-8")).get("base")) is not None:
            seen = seen.parent / base
        assert seen.name == "base.yaml", path


def test_the_strategies_of_the_paper_are_what_they_say() -> None:
    strategies = {name: load(CONFIGS / f"joint_{name}.yaml") for name in ("fix", "x1", "x0.01", "all_scratch", "interval")}
    modes = {name: config.objective.vae_strategy.mode for name, config in strategies.items()}  # type: ignore[attr-defined]
    assert modes == {"fix": "fix", "x1": "joint", "x0.01": "joint", "all_scratch": "joint", "interval": "interval"}
    assert strategies["x0.01"].objective.vae_strategy.learning_rate_factor == 0.01  # type: ignore[attr-defined]
    assert strategies["all_scratch"].init_vae_from is None  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("report_*.yaml")), ids=lambda path: path.stem)
def test_report_configs_load(path: Path) -> None:
    assert load_config(SamplerConfig, path).num_steps >= 1

"""Every file of configs/ loads and builds; the paper's have the paper's parameter counts."""

from pathlib import Path

import pytest
import torch
import yaml

from cola_train.config.load import load_config
from cola_train.config.runs import JointRunConfig, RunConfig, VAERunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.stage1 import Stage1Objective
from cola_train.objectives.stage2 import Stage2Objective

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name.startswith(("vae_", "joint_")))
PAPER_VAE, PAPER_DIT = 501_871_574, 1_829_875_728


def load(path: Path) -> RunConfig:
    return load_config(VAERunConfig if path.name.startswith("vae_") else JointRunConfig, path)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_config_builds_and_opens_with_the_command_that_runs_it(path: Path) -> None:
    verb = path.name.split("_")[0]
    assert path.read_text(encoding="utf-8").startswith(f"# cola-train {verb} configs/{path.name}\n")
    config = load(path)
    assert config.name == path.stem or "quickstart" in path.stem or "smoke" in path.stem
    with torch.device("meta"):
        vae = TextVAE(config.vae)
        if isinstance(config, VAERunConfig):
            Stage1Objective(vae, config.objective, config.seed)
        else:
            assert isinstance(config, JointRunConfig)
            dit = BlockCausalDiT(config.dit)
            Stage2Objective(vae, dit, config.objective, config.seed)
    if "quickstart" not in path.stem and "smoke" not in path.stem:
        assert count(vae) == PAPER_VAE
        if isinstance(config, JointRunConfig):
            assert count(dit) == PAPER_DIT


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

"""Matched baselines, against every size that could have been chosen, and the table of what is
equal.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.config.load import load_config
from cola_train.config.settings import UserError
from cola_train.families.autoregressive.family import AutoregressiveRunConfig
from cola_train.families.costs import flops_after, step_flops
from cola_train.families.masked_diffusion.family import LLaDARunConfig
from cola_train.families.registry import family_of, load_run_config
from cola_train.scaling.match import fairness, match, show
from tests.flops.counting import changed, run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def paper(*overrides: str) -> Any:
    return load_run_config(CONFIGS / "paper" / "joint.yaml", overrides)


def backbone_parameters(config: Any) -> int:
    return family_of(config).backbone_parameters(config)


def test_the_papers_baseline_is_found() -> None:
    for baseline in match(paper(), "parameters").values():
        size = baseline.transformer
        assert (size.num_hidden_layers, size.hidden_size, size.intermediate_size) == (
            27,
            2048,
            8192,
        )
        assert (size.num_attention_heads, size.head_dim, size.vocab_size) == (16, 128, 100278)
        assert abs(backbone_parameters(baseline) / 1_829_875_728 - 1) < 0.01


def resized(baseline: Any, width: int, layers: int) -> Any:
    """The baseline in another width and depth."""
    return changed(
        baseline,
        {
            "transformer.hidden_size": width,
            "transformer.intermediate_size": 4 * width,
            "transformer.num_hidden_layers": layers,
            "transformer.num_attention_heads": width // baseline.transformer.head_dim,
        },
    )


@settings(max_examples=10)
@given(
    width=st.sampled_from([32, 48]),
    layers=st.integers(2, 4),
    equal=st.sampled_from(["parameters", "flops"]),
    convention=st.sampled_from(["paper", "model", "executed"]),
    family=st.sampled_from(["ar", "llada"]),
)
def test_no_other_size_is_nearer(
    width: int, layers: int, equal: Any, convention: str, family: str
) -> None:
    values = {
        "dit.txt_dim": width,
        "dit.emb_dim": width,
        "dit.num_layers": layers,
        "budget.convention": convention,
    }
    config = changed(run_config("joint"), values)

    def error(of: Any) -> float:
        measure = (
            backbone_parameters
            if equal == "parameters"
            else lambda run: step_flops(run, 0)[convention]
        )
        return abs(measure(of) / measure(config) - 1)

    found = match(config, equal)[family]
    chosen = (found.transformer.hidden_size, found.transformer.num_hidden_layers)
    shapes = [
        (other, depth)
        for other in range(8, 3 * width, 8)
        for depth in range(1, 14)
        if 0.5 <= other / depth * layers / width <= 2
    ]
    errors = {shape: error(resized(found, *shape)) for shape in shapes}
    equal_enough = [size for size in errors if errors[size] <= 0.01]
    if not equal_enough:
        assert errors[chosen] == min(errors.values())
    else:
        nearest = min(max(size[0] / width, width / size[0]) for size in equal_enough)
        assert chosen in equal_enough
        assert max(chosen[0] / width, width / chosen[0]) == pytest.approx(nearest)


def test_flops_per_token_are_of_the_whole_run() -> None:
    """Of an interval run they are between those of its phases."""
    interval = paper("objective.vae_strategy.mode=interval", "trainer.max_steps=5000")
    table = fairness(interval, "flops")
    cola = table["families"]["joint"]
    assert cola["FLOPs per token"]["model"] * cola["tokens"] == pytest.approx(
        flops_after(interval, 5000)["model"], rel=1e-12
    )
    for family in ("ar", "llada"):
        ratio = (
            table["families"][family]["FLOPs per token"]["model"] / cola["FLOPs per token"]["model"]
        )
        assert abs(ratio - 1) <= 0.01
        assert table["relative_difference"][family] == pytest.approx(ratio - 1)


def test_tokens_alone_keep_the_dits_shape() -> None:
    table = fairness(paper(), "tokens")
    assert {
        values["network"] for family, values in table["families"].items() if family != "joint"
    } == {"24 x 2048"}
    assert set(table["relative_difference"].values()) == {0.0}


@pytest.mark.parametrize("equal", ["parameters", "flops", "tokens"])
def test_runs_that_end_by_a_budget_end_at_the_same_step(equal: Any) -> None:
    config = paper("budget.eflops=77.856768", "budget.convention=paper")
    families = fairness(config, equal)["families"]
    assert {values["steps"] for values in families.values()} == {10_000}
    assert {values["tokens"] for values in families.values()} == {7_208_960_000}
    assert families["joint"]["EFLOPs in all"]["paper"] == pytest.approx(77.856768)


def test_overrides_make_the_matched_configs() -> None:
    config = paper(
        "data.path=my data/rows",
        "optim.warmup='2e9 tokens'",
        "objective.mask_documents=true",
        "data_seed=7",
        "budget.eflops=1000",
        "budget.marks=['every 100 steps']",
    )
    overrides = fairness(config, "parameters")["overrides"]
    baselines = match(config, "parameters")
    for family, kind in (("ar", AutoregressiveRunConfig), ("llada", LLaDARunConfig)):
        assert load_config(kind, None, overrides[family]) == baselines[family]
        assert baselines[family].objective.mask_documents
        assert (baselines[family].data, baselines[family].data_seed, baselines[family].optim) == (
            config.data,
            7,
            config.optim,
        )


def test_the_table_says_what_is_equal() -> None:
    table = fairness(paper(), "parameters")
    assert json.loads(show(table, as_json=True)) == table
    lines = show(table, as_json=False).splitlines()
    assert lines[:3] == [
        (
            "Equal in parameters of the backbone: the DiT's, and of others all but token embedding "
            "and vocabulary head."
        ),
        "ar: -0.974% from joint's",
        "llada: -0.974% from joint's",
    ]
    rows = {line[:34].strip(): line for line in lines}
    for same in (
        "data: path",
        "data: order seed",
        "tokenizer",
        "tokens",
        "rows per step",
        "schedule: warmup steps",
    ):
        assert rows[same].endswith("="), same
    for other in (
        "backbone's parameters",
        "parameters in all",
        "FLOPs per token: model",
        "EFLOPs in all: executed",
        "network",
    ):
        assert not rows[other].endswith("="), other
    assert rows["backbone's parameters"].split()[2:] == [
        "1,829,875,728",
        "1,812,051,968",
        "1,812,051,968",
    ]
    assert any(line.startswith("Stage 1, which trained the VAE") for line in lines)
    assert any(line.startswith("cola-train llada name=joint_paper_llada ") for line in lines)


def test_only_a_stage_2_run_is_matched() -> None:
    with pytest.raises(
        UserError, match="match starts from a run of joint or distill; small is of 'ar'"
    ):
        match(run_config("ar"), "parameters")

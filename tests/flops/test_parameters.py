"""Parameters from the config alone, against the modules themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cola_train.families.costs import network_parameters
from cola_train.families.registry import family_of, load_run_config
from tests.flops.counting import build_objective, changed, run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
HEADS = ("decoder.final_layer.weight", "decoder.final_layer.bias", "lm_head.weight")
EMBEDDINGS = ("wte.weight", "embed_tokens.weight")
ADALN = ("emb_in.", ".ada.", "txt_out_ada.")


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in the objective."""
    network = ".".join(name.split(".")[: 2 if name.startswith("vae.") else 1])
    kind = "norms" if "norm" in name else "linear"
    kind = "head" if name.endswith(HEADS) else "embedding" if name.endswith(EMBEDDINGS) else kind
    return f"{network}.{'adaln' if any(word in name for word in ADALN) else kind}"


def sums(objective: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, parameter in objective.named_parameters():
        if not name.startswith("reference_encoder."):
            found[part_of(name)] = found.get(part_of(name), 0) + parameter.numel()
    return found


@pytest.mark.parametrize(
    "name",
    [
        "paper/vae",
        "paper/joint",
        "ablations/joint_all_scratch",
        "paper/ar",
        "paper/llada",
        "small/joint_quickstart",
    ],
)
def test_parts_are_sums_over_the_modules(name: str) -> None:
    config = load_run_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        objective = build_objective(config)
    assert family_of(config).parameters(config) == sums(objective)


def test_the_papers_sizes() -> None:
    def config(name: str) -> Any:
        return load_run_config(CONFIGS / "paper" / f"{name}.yaml")

    def backbone(name: str) -> int:
        return family_of(config(name)).backbone_parameters(config(name))

    assert network_parameters(config("joint")) == {"vae": 501_871_574, "dit": 1_829_875_728}
    assert backbone("joint") == 1_829_875_728
    ar = config("ar")
    assert backbone("ar") == backbone("llada") == 1_812_051_968
    assert sum(family_of(ar).parameters(ar).values()) == 1_812_051_968 + 410_738_688
    # Stage 1: all but 100,279 rows of embedding and a head with bias.
    assert backbone("vae") == 501_871_574 - 100_279 * 1536 - 100_278 * 1537


@settings(max_examples=20)
@given(
    bias=st.booleans(),
    norms=st.booleans(),
    qk_norm=st.booleans(),
    qk_affine=st.booleans(),
    qk_bias=st.booleans(),
    patch=st.sampled_from([1, 2]),
    expand=st.integers(1, 3),
    layers=st.integers(1, 3),
)
def test_every_switch_of_the_networks_counts(
    bias: bool,
    norms: bool,
    qk_norm: bool,
    qk_affine: bool,
    qk_bias: bool,
    patch: int,
    expand: int,
    layers: int,
) -> None:
    values = {
        "vae.bias": bias,
        "vae.layer_norm_affine": norms,
        "vae.qk_norm": qk_norm,
        "vae.qk_norm_affine": qk_affine,
        "vae.qk_bias": qk_bias,
        "vae.patch_size": patch,
        "vae.encoder_num_blocks": layers,
        "dit.qk_bias": qk_bias,
        "dit.expand_ratio": expand,
        "dit.num_layers": layers,
        "dit.head_dim": 12,
    }
    config = changed(run_config("joint"), values)
    with torch.device("meta"):
        objective = build_objective(config)
    assert {
        name: count for name, count in family_of(config).parameters(config).items() if count
    } == sums(objective)

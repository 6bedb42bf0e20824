"""Useful work, against loops over masks and modules that know nothing of the ledger's formulas."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cola_train.families.costs import step_flops, step_parts
from cola_train.flops.passes import row_pairs
from cola_train.models.attention.masks import clean_layout, packed_layout, visible_set_mask
from cola_train.models.dit import BlockCausalDiT, DiTBlock
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from tests.flops.counting import changed, run_config, total


def weights(module: nn.Module) -> int:
    """Multiply-adds per position of the matrix products in a module."""
    return sum(
        layer.weight.numel()
        for layer in module.modules()
        if isinstance(layer, (nn.Linear, nn.Conv1d))
    )


def both_ways(multiply_adds: int) -> int:
    """FLOPs of a product with its two gradients."""
    return 3 * 2 * multiply_adds


def clean_mask(length: int, block_size: int) -> Tensor:
    places = clean_layout(length, block_size)
    return visible_set_mask(places, places)[0]


@given(block_size=st.integers(1, 5), blocks=st.integers(1, 6))
def test_visible_pairs_of_a_clean_row(block_size: int, blocks: int) -> None:
    mask = clean_mask(blocks * block_size, block_size)
    pairs = row_pairs(blocks * block_size, block_size)
    assert (pairs.useful, pairs.executed) == (int(mask.sum()), mask.numel())


def naive_dit(config: Any, rows: int) -> dict[str, int]:
    """Position by position and layer by layer: what a wanted velocity needs, all of it with both
    gradients but the first layer.
    """
    dit, size = BlockCausalDiT(config.dit), config.dit.block_size
    latents = config.data.seq_len // config.vae.patch_size
    places = packed_layout(latents, size)
    visible, noised = visible_set_mask(places, places)[0], (places.copy[0] > 0).tolist()
    width = config.dit.heads * config.dit.head_dim
    linear = attended = 0
    for layer, block in enumerate(dit.blocks):
        assert isinstance(block, DiTBlock)
        for position, is_noised in enumerate(noised):
            query = block.msa.proj_qkv.weight.numel() // 3
            linear += 2 * query  # key and value
            if is_noised or layer < config.dit.num_layers - 1:
                linear += query + weights(block.msa.proj_out) + weights(block.mlp)
                attended += 2 * width * int(visible[position].sum())
    linear += sum(noised) * weights(dit.txt_out)
    first = len(noised) * weights(dit.txt_in)
    first_ways = 3 if config.objective.flow.grad_to_encoder else 2
    times = rows * (latents // size if config.objective.flow.timestep_per == "block" else 1) + 1
    adaln = (
        weights(dit.emb_in)
        + weights(dit.txt_out_ada)
        + sum(weights(block.ada) for block in dit.blocks)
    )  # type: ignore[arg-type]
    unread = dit.emb_in.proj_in.weight.numel()  # the gradient of the sinusoids
    return {
        "dit.linear": rows * (both_ways(linear) + 2 * first_ways * first),
        "dit.attention": rows * both_ways(attended),
        "dit.adaln": times * (both_ways(adaln) - 2 * unread),
    }


@settings(max_examples=25)
@given(
    block_size=st.sampled_from([1, 2, 4, 8]),
    blocks=st.integers(1, 4),
    layers=st.integers(1, 3),
    patch=st.sampled_from([1, 2]),
    per=st.sampled_from(["sample", "block"]),
    grad=st.booleans(),
    rows=st.integers(1, 3),
)
def test_the_dits_useful_work(
    block_size: int, blocks: int, layers: int, patch: int, per: str, grad: bool, rows: int
) -> None:
    values = {
        "dit.block_size": block_size,
        "data.seq_len": block_size * blocks * patch,
        "dit.num_layers": layers,
        "vae.patch_size": patch,
        "objective.flow.timestep_per": per,
        "objective.flow.grad_to_encoder": grad,
        "trainer.global_batch_size": rows,
        "trainer.micro_batch_size": 1,
        "dit.head_dim": 12,
    }
    config = changed(run_config("joint"), values)
    parts = step_parts(config)
    assert {
        name: work.model for name, work in parts.items() if name.startswith("dit.")
    } == naive_dit(config, rows)


@settings(max_examples=25)
@given(block_size=st.sampled_from([1, 2, 4]), masks=st.booleans(), ratio=st.floats(0.01, 1.0))
def test_the_vaes_useful_work(block_size: int, masks: bool, ratio: float) -> None:
    config = run_config(
        "vae",
        f"vae.block_size={block_size}",
        f"objective.mask_weight={float(masks)}",
        f"objective.mask_ratio={ratio}",
    )
    vae, seq, rows = TextVAE(config.vae), config.data.seq_len, config.trainer.global_batch_size
    copies = 2 if masks else 1
    heads = rows * (seq + (max(1, round(ratio * seq)) if masks else 0))
    # two blocks, two products
    pairs = int(clean_mask(seq, block_size).sum()) * copies * rows * 2 * 2 * config.vae.dim
    head = weights(vae.decoder.final_layer)
    linear = copies * rows * seq * (weights(vae) - head)
    assert step_flops(config, 0)["model"] == both_ways(linear + heads * head + pairs)


@pytest.mark.parametrize("stage, causal", [("ar", True), ("llada", False)])
def test_a_baselines_useful_work(stage: str, causal: bool) -> None:
    config = run_config(stage)
    network, seq, rows = (
        Transformer(config.transformer, causal),
        config.data.seq_len,
        config.trainer.global_batch_size,
    )
    pairs = int(clean_mask(seq, 1 if causal else seq).sum())
    attended = config.transformer.num_hidden_layers * 2 * pairs * 2 * 16
    body = seq * (weights(network) - weights(network.lm_head))
    head = (seq - 1 if causal else seq) * weights(network.lm_head)
    assert step_flops(config, 0)["model"] == both_ways(rows * (body + head + attended))


@pytest.mark.parametrize("stage", ["vae", "joint", "ar", "llada"])
def test_useful_work_does_not_depend_on_how_a_step_is_spread(stage: str) -> None:
    plain = step_flops(run_config(stage), 0)
    spread = step_flops(
        run_config(
            stage,
            "trainer.micro_batch_size=1",
            "parallel.num_processes=4",
            "parallel.activation_checkpointing=full",
        ),
        0,
    )
    assert spread["model"] == plain["model"] < plain["executed"] < spread["executed"]
    assert spread["paper"] == plain["paper"]


def test_a_frozen_vae_only_encodes_the_clean_rows() -> None:
    parts = step_parts(run_config("joint", "objective.vae_strategy.mode=fix"))
    assert not [name for name in parts if name.startswith(("vae.decoder", "reference"))]
    encoder = total(parts, "vae.encoder")
    assert encoder.model_backward == encoder.executed_backward == encoder.recomputation == 0
    joint = total(step_parts(run_config("joint")), "vae.encoder")
    assert joint.model_forward == 2 * encoder.model_forward  # masked copies too

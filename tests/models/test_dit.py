"""The DiT against loops over positions, and what must be computed once."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cola_train.models import dit
from cola_train.models.attention.masks import clean_layout
from cola_train.models.config import DiTConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from tests.helpers import naive
from tests.helpers.compare import assert_near, every_pair, largest_difference
from tests.helpers.tiny import random_latents, tiny_dit

VARIANTS: list[dict[str, Any]] = [
    {},
    {"rope_dim": 8},
    {"rope_dim": 2},
    {"qk_bias": True},
    {"block_size": 1},
    {"block_size": 2, "expand_ratio": 3},
    {"norm_eps": 0.1},
    {"heads": 4, "head_dim": 6, "rope_dim": 4},
]
LENGTH = 8
# Two rows: times that change within a row, repeat, and reach both ends.
PER_POSITION = torch.tensor(
    [[0.0, 0.3, 0.3, 0.3, 0.999, 0.999, 1.0, 0.5], [0.25, 0.25, 0.0, 0.0, 0.1, 0.7, 0.7, 0.0]]
)


def times_of(per_position: Tensor) -> Times:
    """Distinct times with 0 last."""
    distinct = torch.cat([per_position[per_position > 0].unique(), torch.zeros(1)])
    return Times(distinct, (per_position[..., None] == distinct).int().argmax(-1))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_packed_pass_equals_the_loops(changes: dict[str, Any]) -> None:
    dit = tiny_dit(**changes)
    weights = naive.weights_of(dit)
    z_t, history = random_latents(2, LENGTH, 4, seed=20), random_latents(2, LENGTH, 4, seed=21)
    velocity = dit.velocity(z_t, history, times_of(PER_POSITION))
    for row in range(2):
        expected = naive.packed_velocity(
            dit.config, weights, z_t[row], history[row], PER_POSITION[row].tolist()
        )
        assert_near(velocity[row], expected)


def test_packed_pass_with_documents_and_hidden_history_equals_the_loops() -> None:
    dit = tiny_dit(block_size=2)
    weights = naive.weights_of(dit)
    z_t, history = random_latents(2, LENGTH, 4, seed=22), random_latents(2, LENGTH, 4, seed=23)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1]])
    shown = torch.tensor(
        [[True, True, False, False, True, True, True, True], [True] * 6 + [False] * 2]
    )
    velocity = dit.velocity(z_t, history, times_of(PER_POSITION), documents, shown)
    for row in range(2):
        expected = naive.packed_velocity(
            dit.config,
            weights,
            z_t[row],
            history[row],
            PER_POSITION[row].tolist(),
            documents[row].tolist(),
            shown[row].tolist(),
        )
        assert_near(velocity[row], expected)
    without_hiding = dit.velocity(z_t, history, times_of(PER_POSITION), documents)
    without_documents = dit.velocity(z_t, history, times_of(PER_POSITION), None, shown)
    assert largest_difference(velocity, without_hiding) > 1e-3
    assert largest_difference(velocity, without_documents) > 1e-3


def test_forward_over_a_clean_row_equals_the_loops() -> None:
    dit = tiny_dit()
    latents, per_position = random_latents(1, LENGTH, 4, seed=24), PER_POSITION[1:]
    positions = torch.arange(LENGTH)[None] + 5
    attention = every_pair(clean_layout(LENGTH, 4))
    velocity = dit(latents, times_of(per_position), positions, attention)
    places = naive.clean_row(LENGTH, 4)
    expected = naive.velocity(
        dit.config,
        naive.weights_of(dit),
        latents[0].double().numpy(),
        per_position[0].tolist(),
        places,
    )
    # RoPE is relative: positions from 5 give what positions from 0 give.
    assert_near(velocity[0], expected)


def test_known_modulations_give_the_same_and_run_no_time_layer() -> None:
    dit, times = tiny_dit(), times_of(PER_POSITION)
    z_t, history = random_latents(2, LENGTH, 4, seed=25), random_latents(2, LENGTH, 4, seed=27)
    expected = dit.velocity(z_t, history, times)
    known = dataclasses.replace(times, modulations=dit.modulations(times.distinct))
    for name, module in dit.named_modules():
        if "ada." in name or "emb_in." in name:
            module.register_forward_hook(lambda *_: pytest.fail("a time layer ran"))
    assert_near(dit.velocity(z_t, history, known), expected, 1e-6)


@pytest.mark.parametrize("scale", [0.003, 0.1, -0.02])
def test_small_scales_keep_their_digits_in_bf16(scale: float) -> None:
    """1 + scale in bf16 lost up to 58 % of them; what is left is the rounding of the scale."""
    x = 1 + torch.rand(1, 64, 16)
    scales = scale * (1 + torch.rand(1, 16))
    shift_and_scale = torch.cat([torch.zeros(1, 16), scales], dim=-1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = dit._modulate(x, shift_and_scale, torch.zeros(1, 64, dtype=torch.long))
    assert largest_difference(found / x - 1, scales.expand_as(x)) < abs(scale) * 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sampler_that_rounds_as_released_adds_1_in_the_layers_type(dtype: torch.dtype) -> None:
    network, times = tiny_dit(), times_of(PER_POSITION)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        known = network.modulations(times.distinct)
    rounded = known.rounded()
    for ours, theirs in zip(
        [
            *(getattr(block, name) for block in rounded.blocks for name in ("msa_in", "mlp_in")),
            rounded.out,
        ],
        [
            *(getattr(block, name) for block in known.blocks for name in ("msa_in", "mlp_in")),
            known.out,
        ],
        strict=True,
    ):
        assert theirs.dtype == dtype
        shift, scale = theirs.chunk(2, dim=-1)
        assert torch.equal(ours.chunk(2, dim=-1)[0], shift.float())
        assert torch.equal(1 + ours.chunk(2, dim=-1)[1].float(), (1 + scale).float())


def test_first_outputs_alone_equal_those_of_the_whole() -> None:
    dit, times = tiny_dit(), times_of(PER_POSITION)
    latents = random_latents(2, LENGTH, 4, seed=28)
    attention, positions = (
        every_pair(clean_layout(LENGTH, 4)),
        torch.arange(LENGTH)[None],
    )
    whole = dit(latents, times, positions, attention)
    for outputs in (1, 3, LENGTH):
        assert_near(
            dit(latents, times, positions, attention, outputs=outputs), whole[:, :outputs], 1e-6
        )


def test_time_layers_run_once_per_distinct_time() -> None:
    dit, rows_read = tiny_dit(), {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert name not in rows_read, f"{name} ran twice"
            rows_read[name] = inputs[0].shape[0]

        return hook

    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear) and ("ada." in name or "emb_in." in name):
            module.register_forward_hook(count(name))
    z_t = random_latents(2, LENGTH, 4, seed=26)
    times = times_of(PER_POSITION)
    dit.velocity(z_t, z_t, times)

    num_ada = 4 * dit.config.num_layers + 1
    assert sum(name.endswith(".1") for name in rows_read) == num_ada
    assert {"emb_in.proj_in", "emb_in.proj_hid", "emb_in.proj_out"} <= set(rows_read)
    assert set(rows_read.values()) == {len(set(PER_POSITION.flatten().tolist()))}
    assert len(times.distinct) < PER_POSITION.numel()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_tensors_are_the_formats(changes: dict[str, Any]) -> None:
    """Names and shapes from the format's table."""
    dit = tiny_dit(**changes)
    config = dit.config
    d, inner, hidden = (
        config.txt_dim,
        config.heads * config.head_dim,
        config.txt_dim * config.expand_ratio,
    )
    linear = {"txt_in.proj": (d, 4), "txt_out.proj": (4, d), "txt_out_ada.out_in.1": (2 * d, d)}
    linear |= {"emb_in.proj_in": (d, 256), "emb_in.proj_hid": (d, d), "emb_in.proj_out": (d, d)}
    shapes: dict[str, tuple[int, ...]] = {"txt_out_norm.weight": (d,), "txt_out_norm.bias": (d,)}
    for n in range(config.num_layers):
        block = f"blocks.{n}"
        linear |= {f"{block}.mlp.proj_in": (hidden, d), f"{block}.mlp.proj_out": (d, hidden)}
        linear |= {f"{block}.ada.{part}_in.1": (2 * d, d) for part in ("msa", "mlp")}
        linear |= {f"{block}.ada.{part}_out.1": (d, d) for part in ("msa", "mlp")}
        shapes |= {
            f"{block}.msa.proj_qkv.weight": (3 * inner, d),
            f"{block}.msa.proj_out.weight": (d, inner),
        }
        if config.qk_bias:
            shapes |= {
                f"{block}.msa.proj_qkv.bias": (3 * inner,),
                f"{block}.msa.proj_out.bias": (d,),
            }
        shapes |= {
            f"{block}.msa.{norm}.{kind}": (config.head_dim,)
            for norm in ("norm_q", "norm_k")
            for kind in ("weight", "bias")
        }
        shapes[f"{block}.msa.rope.rope.freqs"] = (config.rope_dim // 2,)
    shapes |= {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    assert {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()} == shapes


def test_the_paper_size() -> None:
    with torch.device("meta"):
        dit = BlockCausalDiT(DiTConfig(block_size=16))
    assert sum(parameter.numel() for parameter in dit.parameters()) == 1_829_875_728
    assert {sum(parameter.numel() for parameter in block.parameters()) for block in dit.blocks} == {
        75_520_512
    }

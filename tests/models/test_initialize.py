"""Initial weights: a function of seed and name, cut where they should be, and silent where
adaLN-Zero wants it.
"""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cola_train.models.dit import BlockCausalDiT
from cola_train.models.initialize import transformer_value
from cola_train.models.modulation import Times
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from tests.helpers.initial import initialize_dit, initialize_text_vae
from tests.helpers.llama import TRANSFORMER_CONFIG
from tests.helpers.tiny import random_latents, tiny_dit, tiny_vae


def initialized_vae(seed: int, start: int = 1) -> TextVAE:
    """From whatever random weights `start` gives."""
    vae = tiny_vae(start, dim=64, ffn_dim=96, init_std=0.03)
    initialize_text_vae(vae, seed)
    return vae


def initialized_dit(seed: int, start: int = 1) -> BlockCausalDiT:
    dit = tiny_dit(start, qk_bias=True)
    initialize_dit(dit, seed)
    return dit


def matrices(network: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach()
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1
    }


@pytest.mark.parametrize("build", [initialized_vae, initialized_dit])
def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(
    build: Callable[..., nn.Module],
) -> None:
    first = build(7, start=1).state_dict()
    torch.manual_seed(123)
    torch.rand(5)
    second = build(7, start=2).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_do_not_depend_on_the_order_of_construction() -> None:
    one_vae, one_dit = initialized_vae(7), initialized_dit(7)
    other_dit, other_vae = initialized_dit(7), initialized_vae(7)
    deeper = tiny_vae(dim=64, ffn_dim=96, init_std=0.03, encoder_num_blocks=3)
    initialize_text_vae(deeper, 7)
    for one, other in ((one_vae, other_vae), (one_dit, other_dit), (one_vae, deeper)):
        weights = other.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in one.state_dict().items())


def test_seeds_and_names_differ() -> None:
    for build in (initialized_vae, initialized_dit):
        first, second = matrices(build(7)), matrices(build(8))
        drawn = [name for name, value in first.items() if value.any()]
        assert drawn
        assert all(not torch.equal(first[name], second[name]) for name in drawn)
    vae, dit = matrices(initialized_vae(7)), matrices(initialized_dit(7))
    assert not torch.equal(
        vae["encoder.blocks.0.qkv_proj.weight"], vae["encoder.blocks.1.qkv_proj.weight"]
    )
    assert not torch.equal(
        vae["encoder.blocks.0.qkv_proj.weight"], vae["decoder.blocks.0.qkv_proj.weight"]
    )
    assert not torch.equal(dit["blocks.0.mlp.proj_in.weight"], dit["blocks.1.mlp.proj_in.weight"])


def test_vae_weights_are_a_truncated_normal() -> None:
    vae = initialized_vae(7)
    std = vae.config.init_std
    drawn = torch.cat([value.flatten() for value in matrices(vae).values()])
    assert drawn.abs().max() <= 3 * std
    # Some come near the cut; of an uncut normal as large, about 0.27 % would lie beyond it.
    assert drawn.abs().max() > 2.9 * std
    assert drawn.numel() > 50_000
    # A normal cut at 3 standard deviations has 0.98658 of its standard deviation left.
    assert abs(float(drawn.std()) / (0.98658 * std) - 1) < 0.01
    for name, parameter in vae.named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(
                parameter,
                (
                    torch.ones_like(parameter)
                    if name.endswith("weight")
                    else torch.zeros_like(parameter)
                ),
            ), name


def test_dit_weights_are_xavier_and_its_velocity_exactly_zero() -> None:
    dit = initialized_dit(7)
    zero = {name for name, value in matrices(dit).items() if not value.any()}
    blocks = range(dit.config.num_layers)
    ada = {
        f"blocks.{n}.ada.{part}.1.weight"
        for n in blocks
        for part in ("msa_in", "mlp_in", "msa_out", "mlp_out")
    }
    assert zero == ada | {"txt_out_ada.out_in.1.weight", "txt_out.proj.weight"}
    for name, value in matrices(dit).items():
        if name not in zero:
            bound = (6 / sum(value.shape)) ** 0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
    z_t = random_latents(2, 8, 4, seed=70)
    times = Times(torch.tensor([0.5, 0.0]), torch.zeros(2, 8, dtype=torch.long))
    assert torch.equal(dit.velocity(z_t, z_t, times), torch.zeros(2, 8, 4))

    # The zeros must not be a dead end: the output layers get a gradient at once, and then so does
    # the rest.
    for _ in range(3):
        dit.zero_grad()
        (dit.velocity(z_t, z_t, times) - 1).square().mean().backward()
        with torch.no_grad():
            for parameter in dit.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(parameter.grad.any() for parameter in dit.parameters())


def test_initialising_touches_no_buffer() -> None:
    dit = tiny_dit()
    before = copy.deepcopy(dict(dit.named_buffers()))
    initialize_dit(dit, 7)
    assert before
    assert all(torch.equal(value, before[name]) for name, value in dit.named_buffers())
    freqs = before["blocks.0.msa.rope.rope.freqs"]
    assert torch.allclose(
        freqs, torch.tensor([10000.0 ** (-2 * i / dit.config.rope_dim) for i in range(len(freqs))])
    )


def transformer_values(seed: int, **changes: int) -> dict[str, torch.Tensor]:
    config = dataclasses.replace(
        TRANSFORMER_CONFIG, hidden_size=64, initializer_range=0.05, **changes
    )
    with torch.device("meta"):
        shapes = {
            name: value.shape
            for name, value in Transformer(config, causal=False).named_parameters()
        }
    return {name: transformer_value(name, shape, config, seed) for name, shape in shapes.items()}


def test_a_baselines_weights_are_a_truncated_normal_and_its_norms_one() -> None:
    values = transformer_values(7, intermediate_size=200)
    drawn = torch.cat([value.flatten() for value in values.values() if value.ndim > 1])
    assert drawn.numel() > 50_000
    assert 2.9 * 0.05 < drawn.abs().max() <= 3 * 0.05
    assert abs(float(drawn.std()) / (0.98658 * 0.05) - 1) < 0.01
    norms = [value for name, value in values.items() if "norm" in name]
    assert len(norms) == 5
    assert all(torch.equal(value, torch.ones(64)) for value in norms)


def test_a_baselines_weights_follow_from_seed_and_name_alone() -> None:
    values, again, other = (
        transformer_values(7),
        transformer_values(7, num_hidden_layers=3),
        transformer_values(8),
    )
    assert len(again) == len(values) + 9
    matrices = {name: value for name, value in values.items() if value.ndim > 1}
    for name, value in matrices.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])
    assert len({float(value.flatten()[0]) for value in matrices.values()}) == len(matrices) == 16

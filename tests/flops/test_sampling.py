"""What generation costs, against torch's counter around real generations, and against sums over the
masks.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train.config.sampling import SamplerConfig, Solver
from cola_train.config.settings import UserError
from cola_train.families.autoregressive.checkpoint import (
    AutoregressiveCheckpoint,
    AutoregressiveGeneration,
)
from cola_train.families.cola.flops import generation_work as block_by_block
from cola_train.families.generate import generate
from cola_train.families.masked_diffusion.checkpoint import (
    MaskedDiffusionCheckpoint,
    generate_masked,
)
from cola_train.models.attention.masks import clean_layout, packed_layout, visible_set_mask
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from tests.flops.counting import changed, counter, run_config, total
from tests.helpers.tiny import random_tokens, tiny_checkpoint, tiny_tokenizer


def prompts(length: int, batch: int) -> list[list[int]]:
    return random_tokens(batch, length, seed=3).tolist()


def sampler(**changes: Any) -> SamplerConfig:
    return SamplerConfig(**{"num_steps": 3, "max_new_tokens": 7, "eos_token_ids": ()} | changes)


@pytest.mark.parametrize("guidance", [1.0, 7.0])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 9, 16, 17])
@pytest.mark.parametrize(
    "overrides", [[], ["vae.patch_size=2"], ["vae.block_size=2", "dit.num_layers=2"]], ids=" ".join
)
def test_blocks_are_what_torch_counts(overrides: list[str], length: int, guidance: float) -> None:
    config, settings_ = run_config("joint", *overrides), sampler(guidance_scale=guidance)
    checkpoint = tiny_checkpoint(TextVAE(config.vae), BlockCausalDiT(config.dit))
    with counter() as counted:
        generate(checkpoint, prompts(length, 2), settings_)
    work = total(checkpoint.generation_work(settings_, length, 2))
    assert work.executed == work.executed_forward == counted.get_total_flops()


@pytest.mark.parametrize("solver", ["heun", "adams2", "adams3"])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7), (0.9, 1.0)])
def test_solvers_and_intervals_are_what_torch_counts(
    solver: Solver, interval: tuple[float, float]
) -> None:
    config, settings_ = (
        run_config("joint"),
        sampler(solver=solver, guidance_interval=interval, guidance_rescale=0.5, num_steps=4),
    )
    checkpoint = tiny_checkpoint(TextVAE(config.vae), BlockCausalDiT(config.dit))
    with counter() as counted:
        generate(checkpoint, prompts(9, 2), settings_)
    assert total(checkpoint.generation_work(settings_, 9, 2)).executed == counted.get_total_flops()


@pytest.mark.parametrize("length", [0, 9])
def test_blocks_that_are_encoded_anew_are_what_torch_counts(length: int) -> None:
    config = run_config("joint", "vae.block_size=2", "vae.patch_size=2")
    settings_ = sampler(history="reencoded", max_new_tokens=20)
    checkpoint = tiny_checkpoint(TextVAE(config.vae), BlockCausalDiT(config.dit))
    with counter() as counted:
        generate(checkpoint, prompts(length, 2), settings_)
    work = total(checkpoint.generation_work(settings_, length, 2))
    assert work.executed == counted.get_total_flops()


@pytest.mark.parametrize("length, new", [(0, 1), (0, 5), (1, 1), (6, 5)])
def test_token_by_token_is_what_torch_counts(length: int, new: int) -> None:
    config, settings_ = run_config("ar"), sampler(max_new_tokens=new)
    network = Transformer(config.transformer, causal=True)
    with counter() as counted, torch.inference_mode():
        generation = AutoregressiveGeneration(
            network, prompts(length, 3), range(3), settings_, start_token_id=1
        )
        for _ in range(new):
            generation.next_token()
    checkpoint = AutoregressiveCheckpoint(network, tiny_tokenizer())
    assert (
        total(checkpoint.generation_work(settings_, length, 3)).executed
        == counted.get_total_flops()
    )


@pytest.mark.parametrize("length, new, num_steps", [(1, 5, 3), (6, 5, 3), (6, 3, 9)])
def test_masked_diffusion_is_what_torch_counts(length: int, new: int, num_steps: int) -> None:
    config, settings_ = run_config("llada"), sampler(max_new_tokens=new, num_steps=num_steps)
    network = Transformer(config.transformer, causal=False)
    with counter() as counted, torch.inference_mode():
        generate_masked(network, prompts(length, 3), range(3), settings_)
    checkpoint = MaskedDiffusionCheckpoint(network, tiny_tokenizer())
    assert (
        total(checkpoint.generation_work(settings_, length, 3)).executed
        == counted.get_total_flops()
    )
    # Text from nothing begins after one token.
    assert checkpoint.generation_work(settings_, 0, 3) == checkpoint.generation_work(
        settings_, 1, 3
    )


@settings(max_examples=30)
@given(
    length=st.integers(0, 20),
    new=st.integers(1, 12),
    num_steps=st.integers(1, 4),
    layers=st.integers(1, 3),
)
def test_useful_attention_of_the_dit(length: int, new: int, num_steps: int, layers: int) -> None:
    """Over the training mask: a step at a block is its noised rows, committing it its clean ones,
    in all layers but the last.
    """
    size = 4
    config = changed(run_config("joint"), {"dit.num_layers": layers})
    history, all_blocks = length // size, -(-(length + new) // size)
    places = packed_layout((all_blocks + 1) * size, size)
    seen = visible_set_mask(places, places)[0].sum(1)
    pairs = 0
    for block in range(all_blocks):
        clean = ((places.copy == 0) & (places.block == block))[0]
        if block < all_blocks - 1:
            pairs += (layers - 1) * int(seen[clean].sum())
        if block >= history:
            noised = ((places.copy == 1) & (places.block == block))[0]
            unconditional = size**2 if block else 0
            pairs += layers * num_steps * (int(seen[noised].sum()) + unconditional)
    parts = block_by_block(
        config.vae, config.dit, sampler(max_new_tokens=new, num_steps=num_steps), length, 2
    )
    assert parts["dit.attention"].model == 2 * pairs * 2 * 2 * 16


@settings(max_examples=30)
@given(length=st.integers(0, 20), new=st.integers(1, 12))
def test_useful_work_token_by_token(length: int, new: int) -> None:
    """Each token but the last passes once; in the last block, only those pass whose next token is
    generated.
    """
    config = run_config("ar", "transformer.num_hidden_layers=1")
    prompt = max(1, length)
    places = clean_layout(prompt + new - 1, 1)
    seen = visible_set_mask(places, places)[0].sum(1)[prompt - 1 :]
    network = Transformer(config.transformer, causal=True)
    attention, mlp = network.model.layers[0].self_attn, network.model.layers[0].mlp  # type: ignore[union-attr]
    kept = sum(layer.weight.numel() for layer in (attention.k_proj, attention.v_proj))  # type: ignore[union-attr]
    read = sum(
        layer.weight.numel() for layer in (attention.q_proj, attention.o_proj, *mlp.children())
    )  # type: ignore[union-attr]
    checkpoint = AutoregressiveCheckpoint(network, tiny_tokenizer())
    parts = checkpoint.generation_work(sampler(max_new_tokens=new), length, 1)
    assert parts["transformer.linear"].model == 2 * ((prompt + new - 1) * kept + new * read)
    assert parts["transformer.attention"].model == 2 * 2 * 32 * int(seen.sum())
    assert parts["transformer.head"].model == 2 * new * network.lm_head.weight.numel()


def test_the_time_embedding_is_computed_once_a_schedule() -> None:
    """Twice the blocks, and only the steps' number counts; t = 0 is read where something is
    clean.
    """
    config = run_config("joint")
    per_time = sum(
        2 * layer.weight.numel()
        for name, layer in BlockCausalDiT(config.dit).named_modules()
        if isinstance(layer, torch.nn.Linear)
        and (".ada." in name or name.startswith(("emb_in", "txt_out_ada")))
    )
    for length, new, steps, useful in (
        (4, 4, 3, 4),
        (4, 40, 3, 4),
        (0, 4, 3, 3),
        (0, 8, 5, 6),
        (1, 1, 5, 6),
    ):
        settings_ = sampler(max_new_tokens=new, num_steps=steps)
        adaln = block_by_block(config.vae, config.dit, settings_, length, 2)["dit.adaln"]
        assert (adaln.model, adaln.executed) == (useful * per_time, (steps + 1) * per_time)


def test_a_vae_alone_generates_nothing() -> None:
    checkpoint = tiny_checkpoint(TextVAE(run_config("vae").vae), None)
    with pytest.raises(UserError, match="holds a VAE only; sampling needs the DiT of stage 2"):
        checkpoint.generation_work(sampler(), 1, 1)

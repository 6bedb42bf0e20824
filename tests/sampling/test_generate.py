"""Generation against a sampler without caches or batches, and what `generate` promises."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train import Checkpoint, SamplerConfig, generate
from cola_train.config.settings import UserError
from cola_train.families.cola.blocks import BlockGeneration, GeneratedBlock
from cola_train.families.cola.prefix import Prefix
from cola_train.families.generate import generate_stream
from cola_train.randomness import Purpose, normal, uniform
from tests.helpers.compare import assert_near, largest_difference
from tests.helpers.sampler import generate_alone
from tests.helpers.tiny import (
    PAD,
    calm,
    random_latents,
    random_tokens,
    tiny_checkpoint,
    tiny_dit,
    tiny_vae,
)

BLOCK_SIZE, CHANNELS = 4, 4
CONFIG = SamplerConfig(num_steps=3, max_new_tokens=6, eos_token_ids=())


@functools.cache
def tiny(patch_size: int) -> Checkpoint:
    return tiny_checkpoint(
        calm(tiny_vae(patch_size=patch_size)), calm(tiny_dit(block_size=BLOCK_SIZE))
    )


@pytest.mark.parametrize("prompts", ["It was", b"It was", ""])
def test_one_text_is_no_list_of_prompts(prompts: Any) -> None:
    with pytest.raises(UserError, match=r'prompts must be a list of prompts, .* \["It was"\]'):
        generate(tiny(1), prompts, CONFIG)


@pytest.mark.parametrize("prompt", [5, None, ["It", "was"], [5.5], {"a": 1}, b"It"])
def test_a_prompt_is_a_text_or_ids(prompt: Any) -> None:
    with pytest.raises(UserError, match=r"prompt 1 must be a text or a list of token ids, not "):
        generate(tiny(1), [[5], prompt], CONFIG)


def noise(prompt: int, block: int) -> Tensor:
    return random_latents(BLOCK_SIZE, CHANNELS, seed=1000 * prompt + block)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return random_tokens(1, length, seed=seed)[0].tolist()


@torch.inference_mode()
def blocks_of(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    config: SamplerConfig = CONFIG,
) -> list[GeneratedBlock]:
    """Every block of a batch, with `noise`."""
    assert checkpoint.dit is not None
    generation = BlockGeneration(
        checkpoint.vae, checkpoint.dit, prompts, indices, config, PAD, noise
    )
    return [generation.next_block() for _ in range(generation.num_blocks)]


# Against the sampler without caches


@pytest.mark.parametrize("guidance_scale", [7.0, 1.0, 0.0])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_blocks_equal_those_of_a_sampler_without_caches(
    patch_size: int, guidance_scale: float
) -> None:
    checkpoint = tiny(patch_size)
    assert checkpoint.dit is not None
    config = dataclasses.replace(
        CONFIG, guidance_scale=guidance_scale, max_new_tokens=12 * patch_size
    )
    block = BLOCK_SIZE * patch_size
    lengths = [0, 1, block - 1, block, block + 1, 2 * block, 2 * block + 3]
    prompts = [prompt_of(length, seed=length) for length in lengths]
    together = blocks_of(checkpoint, prompts, range(len(prompts)), config)
    assert len(together) >= 3
    for row, prompt in enumerate(prompts):
        alone = generate_alone(
            checkpoint.vae,
            checkpoint.dit,
            prompt,
            config,
            PAD,
            len(together),
            functools.partial(noise, row),
        )
        for ours, (latents, logits, ids) in zip(together, alone, strict=True):
            assert_near(ours.latents[row], latents)
            assert_near(ours.logits[row], logits)
            assert ours.tokens[row].tolist() == ids


@torch.inference_mode()
@pytest.mark.parametrize(("patch_size", "vae_block_size"), [(1, 1), (2, 2)])
def test_blocks_that_are_encoded_anew_equal_those_of_a_sampler_without_caches(
    patch_size: int, vae_block_size: int
) -> None:
    vae = calm(tiny_vae(patch_size=patch_size, block_size=vae_block_size))
    dit = calm(tiny_dit(block_size=BLOCK_SIZE))
    tokens_a_block = BLOCK_SIZE * patch_size
    config = dataclasses.replace(
        CONFIG, history="reencoded", max_new_tokens=3 * tokens_a_block, repetition_penalty=1.0
    )
    lengths = [0, 3, tokens_a_block, 2 * tokens_a_block - 1, 2 * tokens_a_block + 1]
    prompts = [prompt_of(length, seed=length) for length in lengths]
    together = blocks_of(tiny_checkpoint(vae, dit), prompts, range(5), config)
    differ = False
    for row, prompt in enumerate(prompts):
        at = functools.partial(noise, row)
        alone = generate_alone(vae, dit, prompt, config, PAD, 3, at)
        for ours, (latents, logits, ids) in zip(together, alone, strict=False):
            assert_near(ours.latents[row], latents)
            assert_near(ours.logits[row], logits)
            assert ours.tokens[row].tolist() == ids
        generated = dataclasses.replace(config, history="generated")
        other = generate_alone(vae, dit, prompt, generated, PAD, 3, at)
        differ |= largest_difference(other[2][0], alone[2][0]) > 1e-3
    assert differ


@torch.inference_mode()
def test_a_text_that_is_encoded_anew_goes_on_as_if_it_were_the_prompt() -> None:
    config = dataclasses.replace(CONFIG, history="reencoded", repetition_penalty=1.0)
    checkpoint, prompt = tiny(1), prompt_of(6)
    assert checkpoint.dit is not None
    first, second, third = blocks_of(
        checkpoint, [prompt], [0], dataclasses.replace(config, max_new_tokens=9)
    )
    longer = [*prompt, *first.tokens[0, 2:].tolist(), *second.tokens[0].tolist()]
    generation = BlockGeneration(
        checkpoint.vae, checkpoint.dit, [longer], [0], config, PAD, lambda row, _: noise(row, 2)
    )
    again = generation.next_block()
    assert_near(again.latents, third.latents)
    assert_near(again.logits, third.logits)


@pytest.mark.parametrize("setting", ["guidance_scale", "num_steps", "repetition_penalty"])
def test_every_setting_of_that_comparison_matters(setting: str) -> None:
    """Else it could agree for want of an effect."""
    other = {"guidance_scale": 1.0, "num_steps": 4, "repetition_penalty": 3.0}[setting]
    prompts = [prompt_of(6)]
    config = dataclasses.replace(CONFIG, max_new_tokens=24)
    one, two = (
        blocks_of(tiny(1), prompts, [0], c)
        for c in (config, dataclasses.replace(config, **{setting: other}))
    )
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
    moved = largest_difference(one[0].latents, two[0].latents)
    assert (moved == 0) == (setting == "repetition_penalty")


# A batch against each alone


@st.composite
def mixed_lengths(draw: st.DrawFn) -> tuple[int, list[int]]:
    """A patch size, and ten lengths: nothing, whole blocks, and any others, in any order."""
    patch_size = draw(st.sampled_from([1, 2]))
    block = BLOCK_SIZE * patch_size
    others = draw(st.lists(st.integers(0, 3 * block), min_size=6, max_size=6))
    return patch_size, draw(st.permutations([0, block, 2 * block, 3 * block - 1, *others]))


@settings(max_examples=8)
@given(mixed_lengths())
def test_a_batch_equals_each_prompt_alone(case: tuple[int, list[int]]) -> None:
    patch_size, lengths = case
    checkpoint = tiny(patch_size)
    prompts = [prompt_of(length, seed=row) for row, length in enumerate(lengths)]
    together = blocks_of(checkpoint, prompts, range(10))
    for row, prompt in enumerate(prompts):
        alone = blocks_of(checkpoint, [prompt], [row])
        # A batch goes on for its longest row.
        assert len(alone) <= len(together)
        for one, other in zip(alone, together, strict=False):
            assert_near(one.latents[0], other.latents[row])
            assert_near(one.logits[0], other.logits[row])
            assert torch.equal(one.tokens[0], other.tokens[row])


@settings(max_examples=4)
@given(mixed_lengths(), st.sampled_from([0.0, 1.0]))
def test_seeded_draws_do_not_depend_on_the_batch_size(
    case: tuple[int, list[int]], temperature: float
) -> None:
    patch_size, lengths = case
    prompts = [prompt_of(length, seed=row) for row, length in enumerate(lengths)]
    config = dataclasses.replace(CONFIG, temperature=temperature)
    by_size = [
        generate(tiny(patch_size), prompts, dataclasses.replace(config, batch_size=size))
        for size in (10, 1, 3)
    ]
    for other in by_size[1:]:
        for one, same in zip(by_size[0], other, strict=True):
            assert (one.text, one.token_ids, one.prompt_ids, one.finish_reason) == (
                same.text,
                same.token_ids,
                same.prompt_ids,
                same.finish_reason,
            )
            assert_near(one.latents, same.latents)


def test_seeded_noise_is_the_next_of_the_prompts_own_draws_in_each_block() -> None:
    config = dataclasses.replace(CONFIG, max_new_tokens=12, seed=5)
    count = BLOCK_SIZE * CHANNELS

    def drawn(prompt: int, block: int) -> Tensor:
        draws = normal(5, Purpose.SAMPLER_NOISE, torch.tensor([prompt]), 3 * count)[0]
        return draws[block * count : (block + 1) * count].reshape(BLOCK_SIZE, CHANNELS)

    prompts = [prompt_of(4), prompt_of(4)]
    for seeded, injected in zip(
        generate(tiny(1), prompts, config), generate(tiny(1), prompts, config, drawn), strict=True
    ):
        assert torch.equal(seeded.latents, injected.latents)


def test_seeded_tokens_are_drawn_anew_in_each_block() -> None:
    """With logits that are the same everywhere, each id follows from its draw alone."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.final_layer.weight.zero_()
    config = dataclasses.replace(
        CONFIG,
        max_new_tokens=12,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=5,
    )
    ids = generate(tiny_checkpoint(vae, tiny_dit()), [[], []], config)
    shares = vae.decoder.final_layer.bias.double().softmax(0)
    likeliest = shares.argsort(descending=True)
    for prompt, result in enumerate(ids):
        draws = uniform(5, Purpose.SAMPLER_TOKEN, torch.tensor([prompt]), 12)[0]
        expected = [
            int(likeliest[int((shares[likeliest].cumsum(0) <= draw).sum())]) for draw in draws
        ]
        assert result.token_ids == expected
    assert ids[0].token_ids != ids[1].token_ids


def test_equal_prompts_at_two_places_and_two_seeds_differ() -> None:
    first, second = generate(tiny(1), [prompt_of(3)] * 2, CONFIG)
    (reseeded,) = generate(tiny(1), [prompt_of(3)], dataclasses.replace(CONFIG, seed=1))
    assert largest_difference(first.latents, second.latents) > 1e-2
    assert largest_difference(first.latents, reseeded.latents) > 1e-2
    hot = dataclasses.replace(CONFIG, temperature=2.0, top_k=0, top_p=1.0, max_new_tokens=20)
    assert (
        generate(tiny(1), [prompt_of(3)], hot, noise)[0].token_ids
        != generate(tiny(1), [prompt_of(3)], CONFIG, noise)[0].token_ids
    )
    reseeded_hot = dataclasses.replace(hot, seed=1)
    assert (
        generate(tiny(1), [prompt_of(3)], hot, noise)[0].token_ids
        != generate(tiny(1), [prompt_of(3)], reseeded_hot, noise)[0].token_ids
    )


# The result


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("max_new_tokens", [1, 4, 7, 8, 9])
def test_as_many_tokens_as_asked_and_their_latents(patch_size: int, max_new_tokens: int) -> None:
    checkpoint, block = tiny(patch_size), BLOCK_SIZE * patch_size
    config = dataclasses.replace(CONFIG, max_new_tokens=max_new_tokens)
    prompts = [prompt_of(length, seed=length) for length in (0, 1, block - 1, block, block + 3)]
    results = generate(checkpoint, prompts, config, noise)
    together = blocks_of(checkpoint, prompts, range(len(prompts)), config)
    decoded = torch.cat([part.tokens for part in together], dim=1).tolist()
    latents = torch.cat([part.latents for part in together], dim=1)
    for row, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        # A half-filled latent that completes a block is history whole; its second token is never
        # returned.
        opening = 0 if -(-len(prompt) // patch_size) % BLOCK_SIZE == 0 else len(prompt) % block
        assert len(result.token_ids) == max_new_tokens
        assert result.token_ids == decoded[row][opening : opening + max_new_tokens]
        assert result.finish_reason == "length"
        assert result.prompt_ids == prompt
        assert result.text == checkpoint.tokenizer.decode(result.token_ids)
        known, end = (
            math.ceil(opening / patch_size),
            math.ceil((opening + max_new_tokens) / patch_size),
        )
        assert result.latents.shape == (end - known, CHANNELS)
        assert_near(result.latents, latents[row, known:end])


@settings(max_examples=200)
@given(st.integers(0, 60), st.integers(1, 3), st.integers(1, 5))
def test_how_a_prompt_divides(num_tokens: int, patch_size: int, block_size: int) -> None:
    """By going through its tokens: which latent and block each falls in."""
    prefix = Prefix(num_tokens, patch_size, block_size)
    latents = {token // patch_size for token in range(num_tokens)}
    blocks: dict[int, set[int]] = {}
    for latent in latents:
        blocks.setdefault(latent // block_size, set()).add(latent)
    whole = [block for block, members in blocks.items() if len(members) == block_size]
    open_latents = {latent for latent in latents if latent // block_size not in whole}
    assert prefix.num_tokens == num_tokens
    assert prefix.history_blocks == len(whole)
    assert prefix.known_latents == len(open_latents)
    assert prefix.known_tokens == sum(
        token // patch_size in open_latents for token in range(num_tokens)
    )


def test_text_is_encoded_and_decoded_and_nothing_is_a_prompt_too() -> None:
    checkpoint = tiny(1)
    texts = ["w5 w9 w7", "", "w4 <|im_end|> w6"]
    from_text, from_ids = (
        generate(checkpoint, texts, CONFIG),
        generate(checkpoint, [[5, 9, 7], [], [4, 2, 6]], CONFIG),
    )
    for one, other in zip(from_text, from_ids, strict=True):
        assert (one.text, one.token_ids, one.prompt_ids) == (
            other.text,
            other.token_ids,
            other.prompt_ids,
        )
        assert len(one.token_ids) == CONFIG.max_new_tokens
    assert from_text[0].text == " ".join(
        f"w{token}" for token in from_text[0].token_ids if token >= 4
    )
    assert generate(checkpoint, [], CONFIG) == []


def test_results_come_in_order_and_as_they_are_ready() -> None:
    prompts = [prompt_of(length, seed=length) for length in (7, 0, 3, 12, 1)]
    expected = generate(tiny(1), prompts, CONFIG)
    stream = generate_stream(tiny(1), prompts, dataclasses.replace(CONFIG, batch_size=2))
    passes: list[int] = []
    dit = tiny(1).dit
    assert dit is not None
    handle = dit.register_forward_hook(lambda *_: passes.append(1))
    seen = []
    for result in stream:
        seen.append(len(passes))
        assert (result.prompt_ids, result.token_ids) == (
            prompts[len(seen) - 1],
            expected[len(seen) - 1].token_ids,
        )
    handle.remove()
    assert len(seen) == 5
    # The second waits for the first, which takes a block more; the third took its place, and ends
    # with the fourth.
    assert seen[0] == seen[1] < seen[2] == seen[3] < seen[4]


def test_draws_are_those_of_the_address_that_a_prompt_is_given() -> None:
    config = dataclasses.replace(CONFIG, temperature=1.0)
    prompts = [prompt_of(length, seed=length) for length in (7, 0, 3)]
    plain = [result.token_ids for result in generate(tiny(1), prompts, config)]
    addressed = generate(
        tiny(1), prompts[::-1], dataclasses.replace(config, batch_size=2), prompt_indices=[2, 1, 0]
    )
    assert [result.token_ids for result in addressed] == plain[::-1]
    (far,) = generate(tiny(1), prompts[:1], config, prompt_indices=[2**62 + 5])
    assert far.token_ids != plain[0]


# The end of the text


@pytest.mark.parametrize("patch_size", [1, 2])
def test_an_end_token_ends_its_own_text_alone(patch_size: int) -> None:
    # not calmed: its texts have few ids in common
    checkpoint = tiny_checkpoint(tiny_vae(patch_size=patch_size), tiny_dit())
    config = dataclasses.replace(CONFIG, max_new_tokens=14)
    prompts = [prompt_of(length, seed=length) for length in (0, 3, 9)]
    free = generate(checkpoint, prompts, config, noise)
    reasons = []
    for stop in set(free[1].token_ids):
        results = generate(
            checkpoint, prompts, dataclasses.replace(config, eos_token_ids=(stop, 10_000)), noise
        )
        for row, (before, after) in enumerate(zip(free, results, strict=True)):
            end = [*before.token_ids, stop].index(stop)
            assert after.token_ids == before.token_ids[:end]
            assert after.finish_reason == ("stop" if end < config.max_new_tokens else "length")
            assert after.text == checkpoint.tokenizer.decode(before.token_ids[:end])
            opening = Prefix(len(prompts[row]), patch_size, BLOCK_SIZE)
            generated = math.ceil((opening.known_tokens + end) / patch_size) - opening.known_latents
            assert after.latents.shape == (max(generated, 0), CHANNELS)
            assert_near(after.latents, before.latents[: len(after.latents)])
            # The block that holds the stop is decoded whole, and nothing after it, whatever the
            # other rows need.
            block, held = patch_size * BLOCK_SIZE, opening.known_tokens
            last = (held + end) // block * block + block - held
            assert after.decoded_ids == before.token_ids[:last]
            reasons.append((after.finish_reason, len(after.decoded_ids) < config.max_new_tokens))
    assert {("stop", True), ("stop", False), ("length", False)} == set(reasons)


def test_an_end_token_at_a_prompt_position_ends_nothing() -> None:
    checkpoint = tiny(1)
    decoded = 0
    for seed in range(10):
        prompt = prompt_of(7, seed=seed)
        (free,) = generate(checkpoint, [prompt], CONFIG, noise)
        first, *_ = blocks_of(checkpoint, [prompt], [0])
        at_prompt = first.tokens[0, :3].tolist()
        for stop in {*prompt, *at_prompt} - set(free.token_ids):
            (result,) = generate(
                checkpoint, [prompt], dataclasses.replace(CONFIG, eos_token_ids=(stop,)), noise
            )
            assert (result.token_ids, result.finish_reason) == (free.token_ids, "length")
            decoded += stop in at_prompt
    assert decoded > 0  # an end token was decoded at a known position


@pytest.mark.parametrize("stop", ["<|endoftext|>", "<|im_end|>"])
def test_the_tokenizers_own_end_tokens_are_the_default(stop: str) -> None:
    vae = tiny_vae()
    checkpoint = tiny_checkpoint(vae, tiny_dit())
    with torch.no_grad():
        vae.decoder.final_layer.bias[checkpoint.tokenizer.encode(stop)[0]] += 1000.0
    (ended,) = generate(checkpoint, [prompt_of(2)], dataclasses.replace(CONFIG, eos_token_ids=None))
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([], "", "stop")
    assert ended.latents.shape == (0, CHANNELS)
    (free,) = generate(checkpoint, [prompt_of(2)], CONFIG)
    assert (free.token_ids, free.finish_reason) == (
        checkpoint.tokenizer.encode(stop) * CONFIG.max_new_tokens,
        "length",
    )


def test_generation_stops_once_all_texts_have_ended() -> None:
    checkpoint = tiny(1)
    assert checkpoint.dit is not None
    config = dataclasses.replace(CONFIG, max_new_tokens=40)
    (free,) = generate(checkpoint, [prompt_of(2)], config, noise)
    blocks: set[int] = set()

    def counting_noise(prompt: int, block: int) -> Tensor:
        blocks.add(block)
        return noise(prompt, block)

    generate(
        checkpoint,
        [prompt_of(2)],
        dataclasses.replace(config, eos_token_ids=(free.token_ids[1],)),
        counting_noise,
    )
    assert blocks == {0}


# Guidance, padding, rounding


def dit_rows(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], config: SamplerConfig
) -> list[int]:
    """The number of rows of each DiT pass."""
    assert checkpoint.dit is not None
    rows: list[int] = []
    handle = checkpoint.dit.register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0].shape[0])
    )
    generate(checkpoint, prompts, config, noise)
    handle.remove()
    return rows


def test_the_unconditional_branch_runs_only_where_it_is_used() -> None:
    config = dataclasses.replace(CONFIG, max_new_tokens=8)
    history, prompts = 1, [prompt_of(4), prompt_of(5)]
    steps = config.num_steps
    # The second prompt opens a block of its own, and goes on alone.
    assert (
        dit_rows(tiny(1), prompts, config)
        == [2] * history + [4] * steps + [2] + [4] * steps + [1] + [2] * steps
    )
    unguided = dit_rows(tiny(1), prompts, dataclasses.replace(config, guidance_scale=1.0))
    assert unguided == [2] * (history + steps + 1 + steps) + [1] * (1 + steps)
    # Without history both branches are the same, so the first block needs one.
    assert dit_rows(tiny(1), [[]], config) == [1] * steps + [1] + [2] * steps


def test_a_first_block_without_history_does_not_depend_on_guidance() -> None:
    config = dataclasses.replace(CONFIG, max_new_tokens=8)
    for prompt in ([], prompt_of(3)):
        weak, strong = (
            blocks_of(tiny(1), [prompt], [0], dataclasses.replace(config, guidance_scale=g))
            for g in (1.0, 7.0)
        )
        assert_near(weak[0].latents, strong[0].latents, 0)
        assert largest_difference(weak[1].latents, strong[1].latents) > 1e-2


def test_the_prompts_latents_are_pinned() -> None:
    prompt = prompt_of(7)
    first, *_ = blocks_of(tiny(1), [prompt], [0])
    assert_near(first.latents[0, :3], tiny(1).vae.encode(torch.tensor([prompt])).mean[0, 4:])


@pytest.mark.parametrize("vae_block_size", [1, 4])
def test_padding_shows_only_inside_the_vaes_own_blocks(vae_block_size: int) -> None:
    checkpoint = tiny_checkpoint(tiny_vae(block_size=vae_block_size), tiny_dit())
    one, other = (
        generate(checkpoint, [prompt_of(3)], dataclasses.replace(CONFIG, pad_token_id=pad), noise)[
            0
        ].latents
        for pad in (3, 9)
    )
    assert (largest_difference(one, other) > 1e-4) == (vae_block_size > 1)
    default = generate(checkpoint, [prompt_of(3)], CONFIG, noise)[0].latents
    assert_near(default, one, 0)


def test_released_rounding_rounds_times_and_latents_on_their_way_into_the_dit() -> None:
    checkpoint = tiny_checkpoint(tiny_vae(), tiny_dit())
    assert checkpoint.dit is not None
    times: list[float] = []
    latents: list[Tensor] = []
    checkpoint.dit.emb_in.register_forward_pre_hook(
        lambda module, inputs: times.extend((1000 * inputs[0]).tolist())
    )
    checkpoint.dit.txt_in.proj.register_forward_pre_hook(
        lambda module, inputs: latents.append(inputs[0])
    )
    config = dataclasses.replace(CONFIG, num_steps=7, max_new_tokens=8)
    (exact,) = generate(checkpoint, [prompt_of(5)], config, noise)
    exact_times, exact_latents = list(times), list(latents)
    times.clear()
    latents.clear()
    (rounded,) = generate(
        checkpoint, [prompt_of(5)], dataclasses.replace(config, released_rounding=True), noise
    )

    assert len(times) == len(exact_times)
    for ours, wanted in zip(times, exact_times, strict=True):
        # From 512 on, bf16 has steps of 4.
        step = 4 if wanted >= 512 else 2 ** math.floor(math.log2(max(wanted, 1)) - 7)
        assert ours == pytest.approx(wanted, abs=step / 2 + 1e-3)
        assert ours / step == pytest.approx(round(ours / step), abs=1e-3)
    assert any(abs(ours - wanted) > 0.5 for ours, wanted in zip(times, exact_times, strict=True))
    assert all(torch.equal(x, x.bfloat16().float()) for x in latents)
    assert not all(torch.equal(x, x.bfloat16().float()) for x in exact_latents)
    # The state itself stays fp32, and the text near what it is without rounding.
    assert not torch.equal(rounded.latents, rounded.latents.bfloat16().float())
    assert 1e-4 < largest_difference(rounded.latents, exact.latents) < 1.0


def test_scaled_latents_decode_as_themselves() -> None:
    """The DiT and the results see scaled latents, the decoder unscaled ones."""
    plain, scaled = tiny_vae(), tiny_vae(scaling_factor=0.5, shifting_factor=0.25)
    dit = tiny_dit()
    of_scaled = blocks_of(tiny_checkpoint(scaled, dit), [prompt_of(6)], [0])
    raw = torch.cat([block.latents for block in of_scaled], dim=1) / 0.5 + 0.25
    prompt = plain.encode(torch.tensor([prompt_of(6)])).mean[:, :4]
    logits = plain.decode(torch.cat([prompt, raw], dim=1))[:, 4:]
    assert_near(torch.cat([block.logits for block in of_scaled], dim=1), logits)
    known = plain.encode(torch.tensor([prompt_of(6)])).mean[0, 4:6]
    assert_near(of_scaled[0].latents[0, :2], (known - 0.25) * 0.5)


# State


def attributes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What hangs on each module beside its parameters and submodules, and every tensor's
    content.
    """
    out: dict[str, Any] = {}
    for network in (checkpoint.vae, checkpoint.dit):
        assert network is not None
        for name, module in network.named_modules():
            out[f"{type(network).__name__}.{name}"] = sorted(vars(module))
        out |= {
            f"{type(network).__name__}.{name}": value.sum().item()
            for name, value in network.state_dict().items()
        }
    return out


def test_generating_leaves_nothing_behind() -> None:
    checkpoint = tiny(2)
    prompts = [prompt_of(length, seed=length) for length in (0, 5, 17)]
    before = attributes(checkpoint)
    first = generate(checkpoint, prompts, CONFIG)
    assert attributes(checkpoint) == before
    generate(
        checkpoint, [prompt_of(9)], dataclasses.replace(CONFIG, max_new_tokens=20, temperature=1.0)
    )
    again = generate(checkpoint, prompts, CONFIG)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert one.token_ids == other.token_ids


def test_two_generations_in_turn_do_not_disturb_each_other() -> None:
    checkpoint = tiny(1)
    assert checkpoint.dit is not None
    config = dataclasses.replace(CONFIG, max_new_tokens=12)
    prompts = [prompt_of(5, seed=1), prompt_of(9, seed=2)]
    alone = [blocks_of(checkpoint, [prompt], [row], config) for row, prompt in enumerate(prompts)]
    with torch.inference_mode():
        generations = [
            BlockGeneration(checkpoint.vae, checkpoint.dit, [prompt], [row], config, PAD, noise)
            for row, prompt in enumerate(prompts)
        ]
        for number in range(3):
            for generation, expected in zip(generations, alone, strict=True):
                assert torch.equal(generation.next_block().latents, expected[number].latents)


# What is refused


@pytest.mark.parametrize(
    ("prompt", "config", "message"),
    [
        ([4, 29], {}, r"prompt 1: id 29 at position 1 is outside the vocabulary, 0\.\.28\."),
        ([-1], {}, r"prompt 1: id -1 at position 0 is outside the vocabulary"),
        (
            [4],
            {"pad_token_id": 29},
            r"pad_token_id: id 29 at position 0 is outside the vocabulary, 0\.\.28\.",
        ),
    ],
)
def test_ids_outside_the_vocabulary(
    prompt: list[int], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(tiny(1), [[4], prompt], dataclasses.replace(CONFIG, **config))


def test_a_checkpoint_without_a_dit() -> None:
    with pytest.raises(UserError, match=r"holds a VAE only; sampling needs the DiT of stage 2"):
        generate(tiny_checkpoint(tiny_vae(), None), ["w5"], CONFIG)


def test_noise_of_the_wrong_shape() -> None:
    with pytest.raises(UserError, match=r"noise must give \(4, 4\) per block, not \(4, 5\)"):
        generate(tiny(1), ["w5"], CONFIG, lambda prompt, block: torch.zeros(4, 5))


@pytest.mark.parametrize("seq_len", [None, 10, 9])
def test_more_tokens_than_training_saw_warns(checkpoint: Checkpoint, seq_len: int | None) -> None:
    checkpoint.training = {} if seq_len is None else {"seq_len": seq_len}
    prompts = [prompt_of(1), prompt_of(4)]  # 4 and 6 new ones come to 10
    if seq_len == 9:
        with pytest.warns(
            UserWarning, match=r"come to 10 tokens; this model was trained on rows of 9"
        ):
            generate(checkpoint, prompts, CONFIG)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            generate(checkpoint, prompts, CONFIG)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"temperature": -0.1}, r"temperature must be at least 0, not -0.1"),
        ({"top_k": -1}, r"top_k must be at least 0, not -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], not 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, not 0.0"),
        (
            {"guidance_interval": (0.6, 0.4)},
            r"guidance_interval must be two times in \[0, 1\], the lower first, not \(0.6, 0.4\)",
        ),
        (
            {"guidance_interval": (0.0, 1.5)},
            r"guidance_interval must be two times in \[0, 1\], the lower first, not \(0.0, 1.5\)",
        ),
        ({"noise_scale": -0.5}, r"noise_scale must be in \[0, 100\], not -0.5"),
        ({"guidance_rescale": 1.2}, r"guidance_rescale must be in \[0, 1\], not 1.2"),
    ],
)
def test_settings_out_of_range(field: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplerConfig(**field)

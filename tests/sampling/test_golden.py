"""The sampler against numbers written by the released code, one prompt a call there."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.families.cola.blocks import BlockGeneration
from cola_train.families.generate import generate
from tests.helpers.compare import assert_near
from tests.helpers.golden import Golden

CONFIG = SamplerConfig(eos_token_ids=(), pad_token_id=3)


def noise_of(golden: Golden, prompt: int, block: int) -> Tensor:
    """The reference's initial noise; zeros for blocks that it did not generate, which nothing
    compared here can see.
    """
    like = golden.samples["noise/0/0"]
    return golden.samples.get(f"noise/{prompt}/{block}", torch.zeros_like(like))


@torch.inference_mode()
def assert_blocks_agree(golden: Golden, indices: Sequence[int]) -> int:
    """Generate these prompts together; compare each reference block. Returns how many there
    were.
    """
    vae, dit = golden.checkpoint.vae, golden.checkpoint.dit
    assert dit is not None
    prompts = [golden.prompts[index] for index in indices]
    generation = BlockGeneration(
        vae, dit, prompts, indices, CONFIG, 3, lambda index, block: noise_of(golden, index, block)
    )
    compared = 0
    for number in range(max(golden.results[index]["n_blocks"] for index in indices)):
        block = generation.next_block()
        for row, index in enumerate(indices):
            if number < golden.results[index]["n_blocks"]:
                assert_near(block.latents[row], golden.samples[f"latents/{index}/{number}"])
                assert_near(block.logits[row], golden.samples[f"logits/{index}/{number}"])
                assert block.tokens[row].tolist() == golden.results[index]["block_ids"][number]
                compared += 1
    assert [prefix.known_tokens for prefix in generation.prefixes] == [
        golden.results[index]["trim"] for index in indices
    ]
    return compared


def test_all_prompts_in_one_batch(golden: Golden) -> None:
    assert assert_blocks_agree(golden, range(10)) == sum(
        name.startswith("latents/") for name in golden.samples
    )


@pytest.mark.parametrize("index", range(10))
def test_each_prompt_alone(golden: Golden, index: int) -> None:
    assert assert_blocks_agree(golden, [index]) == golden.results[index]["n_blocks"]


def test_prompt_latents(golden: Golden) -> None:
    for index, prompt in enumerate(golden.prompts):
        expected = golden.samples[f"prompt_latents/{index}"]
        width = expected.shape[0] * golden.checkpoint.vae.config.patch_size
        padded = torch.tensor([[*prompt, *[3] * (width - len(prompt))]])
        assert_near(golden.checkpoint.vae.encode(padded).mean[0], expected)


def test_ids_that_are_returned(golden: Golden) -> None:
    results = generate(
        golden.checkpoint,
        golden.prompts,
        CONFIG,
        lambda index, block: noise_of(golden, index, block),
    )
    lengths = set()
    for result, expected in zip(results, golden.results, strict=True):
        ids = expected["token_ids"]
        # The reference stops short of 32 where prompt positions fill part of its first block; ours
        # goes on.
        assert result.token_ids[: len(ids)] == ids
        assert len(result.token_ids) == CONFIG.max_new_tokens
        assert result.prompt_ids == expected["prompt_ids"]
        lengths.add(len(ids))
    assert CONFIG.max_new_tokens in lengths
    assert min(lengths) < CONFIG.max_new_tokens

"""The sampler's options: each against a sampler without caches, or against the plain path that it
replaces.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from cola_train import Checkpoint, SamplerConfig, generate
from cola_train.families.cola.blocks import BlockGeneration
from cola_train.sampling.precision import ready_for_passes
from tests.helpers.compare import assert_near, largest_difference
from tests.helpers.llama import tiny_baseline
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

CONFIG = SamplerConfig(num_steps=4, max_new_tokens=8, eos_token_ids=())
OPTIONS = [
    {"solver": "heun"},
    {"solver": "adams2"},
    {"guidance_interval": (0.4, 0.8)},
    {"guidance_rescale": 0.7},
    {"solver": "adams2", "guidance_interval": (0.4, 1.0), "guidance_rescale": 0.3},
    {"noise_scale": 0.5},
    {"history": "reencoded"},
]


@functools.cache
def tiny() -> Checkpoint:
    return tiny_checkpoint(calm(tiny_vae()), calm(tiny_dit()))


def prompts() -> list[list[int]]:
    return [random_tokens(1, length, seed=length)[0].tolist() for length in (0, 3, 4, 9)]


def noise(prompt: int, block: int) -> Tensor:
    return random_latents(4, 4, seed=1000 * prompt + block)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_equal_those_of_a_sampler_without_caches(options: dict[str, Any]) -> None:
    config, checkpoint = dataclasses.replace(CONFIG, **options), tiny()
    assert checkpoint.dit is not None
    with torch.inference_mode():
        generation = BlockGeneration(
            checkpoint.vae, checkpoint.dit, prompts(), range(4), config, PAD, noise
        )
        blocks = [generation.next_block() for _ in range(2)]
        for row, prompt in enumerate(prompts()):
            alone = generate_alone(
                checkpoint.vae,
                checkpoint.dit,
                prompt,
                config,
                PAD,
                2,
                functools.partial(noise, row),
            )
            for block, (latents, _, ids) in zip(blocks, alone, strict=True):
                assert_near(block.latents[row], latents)
                assert block.tokens[row].tolist() == ids
    # Each has an effect, so that the two cannot agree for want of one.
    plain = generate(checkpoint, prompts(), CONFIG, noise)[3].latents
    assert (
        largest_difference(generate(checkpoint, prompts(), config, noise)[3].latents, plain) > 1e-3
    )


def passes(config: SamplerConfig) -> list[tuple[int, int]]:
    """Rows of each pass of the DiT, and whether its outputs are read, while one prompt of a block
    is continued by one.
    """
    found: list[tuple[int, int]] = []
    dit = tiny().dit
    assert dit is not None
    handle = dit.register_forward_hook(
        lambda module, inputs, out: found.append((len(inputs[0]), out.shape[1]))
    )
    generate(
        tiny(),
        [random_tokens(1, 4, seed=1)[0].tolist()],
        dataclasses.replace(config, max_new_tokens=4),
        noise,
    )
    handle.remove()
    return found


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [2, 2, 2, 2]),
        ({"guidance_interval": (0.4, 0.8)}, [1, 2, 2, 1]),  # t = 1, 3/4, 1/2, 1/4
        ({"guidance_interval": (0.5, 0.5)}, [1, 1, 2, 1]),
        ({"guidance_scale": 1.0}, [1, 1, 1, 1]),
        ({"solver": "heun"}, [2] * 7),
        ({"solver": "adams2"}, [2] * 4),
        ({"solver": "adams3", "guidance_interval": (0.6, 1.0)}, [2, 2, 2, 1, 1]),
    ],
    ids=str,
)
def test_passes_of_a_block(options: dict[str, Any], rows: list[int]) -> None:
    """The first one fills the cache, and nobody reads its outputs."""
    assert passes(dataclasses.replace(CONFIG, **options)) == [
        (1, 0),
        *((count, 4) for count in rows),
    ]


def test_an_interval_ends_at_the_times_that_it_names() -> None:
    """1 - 9/10 is less than 0.1 in floating point, and 0.1 is inside all the same."""
    guided = [
        SamplerConfig(guidance_interval=(0.1, 0.9)).guides_at(1 - step / 10) for step in range(10)
    ]
    assert guided == [False] + [True] * 9


def test_what_depends_on_time_alone_is_computed_once_for_all_blocks_and_prompts() -> None:
    dit = tiny().dit
    assert dit is not None
    times: list[Tensor] = []
    layers: list[Tensor] = []
    handles = [dit.emb_in.register_forward_pre_hook(lambda module, inputs: times.append(inputs[0]))]
    handles += [
        block.ada.msa_in.register_forward_pre_hook(lambda module, inputs: layers.append(inputs[0]))  # type: ignore[union-attr]
        for block in dit.blocks
    ]
    generate(tiny(), prompts(), dataclasses.replace(CONFIG, batch_size=2), noise)
    for handle in handles:
        handle.remove()
    assert [t.tolist() for t in times] == [[1.0, 0.75, 0.5, 0.25, 0.0]]
    assert [len(x) for x in layers] == [5] * len(dit.blocks)


def test_compiled_passes_equal_eager_ones_and_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For all blocks, rows that begin and end at different times, and cache lengths; with a backend
    that needs no C++ compiler.
    """
    # what checks shapes here is no part of what is compiled
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    counted = CompileCounterWithBackend("aot_eager")
    compiled: Callable[..., Any] = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda network, *, dynamic, mode: compiled(network, dynamic=dynamic, backend=counted),
    )
    many = [random_tokens(1, length, seed=length)[0].tolist() for length in (4, 5, 9, 12, 17)]
    config = dataclasses.replace(CONFIG, batch_size=2)
    eager = generate(tiny(), many, config, noise)
    for one, other in zip(
        generate(tiny(), many, dataclasses.replace(config, compile=True), noise), eager, strict=True
    ):
        assert_near(one.latents, other.latents)
        assert one.token_ids == other.token_ids
    assert counted.frame_count == 1


def test_bf16_is_autocast_to_the_bit_with_weights_cast_beforehand() -> None:
    config = dataclasses.replace(CONFIG, precision="bf16")
    checkpoint = tiny()
    networks: list[tuple[nn.Module, Tensor]] = [
        (checkpoint.vae.decoder, random_latents(2, 8, 4, seed=3))
    ]
    networks.append((tiny_baseline(True).transformer, random_tokens(2, 8, seed=4)))
    for network, inputs in networks:
        ready = ready_for_passes(network, config, torch.device("cpu"))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ready(inputs), network(inputs))
        types = {name: parameter.dtype for name, parameter in ready.named_parameters()}
        assert {torch.bfloat16, torch.float32} == set(types.values())
        for name, parameter in ready.named_parameters():
            assert (parameter is network.get_parameter(name)) == (parameter.dtype == torch.float32)
        assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_precision_is_fp32_on_a_cpu_unless_asked_for() -> None:
    by_precision = {}
    for precision in ("auto", "fp32", "bf16"):
        config = dataclasses.replace(CONFIG, precision=precision)
        by_precision[precision] = torch.cat(
            [result.latents for result in generate(tiny(), prompts(), config, noise)]
        )
    assert torch.equal(by_precision["auto"], by_precision["fp32"])
    assert 1e-4 < largest_difference(by_precision["bf16"], by_precision["fp32"]) < 0.5
    assert ready_for_passes(tiny().vae, CONFIG, torch.device("cpu")) is tiny().vae

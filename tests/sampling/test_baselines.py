"""The baselines' generation against samplers without caches or batches, and against
transformers'.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train import SamplerConfig, generate
from cola_train.config.settings import UserError
from cola_train.evaluation.writing.sample import sample
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.models.transformer import Transformer
from cola_train.randomness import Purpose, uniform
from cola_train.sampling.token_choice import choose_tokens, penalize_repetition
from tests.helpers.llama import llama_of, tiny_baseline
from tests.helpers.tiny import random_tokens

CONFIG = SamplerConfig(num_steps=3, max_new_tokens=7, eos_token_ids=(), repetition_penalty=1.0)
EOS = 0
LENGTHS = st.permutations([0, 1, 4, 4, 9])


@functools.cache
def tiny(causal: bool) -> TransformerCheckpoint:
    return tiny_baseline(causal)


def prompts_of(lengths: Sequence[int]) -> list[list[int]]:
    return [
        random_tokens(1, length, seed=70 + row)[0].tolist() for row, length in enumerate(lengths)
    ]


def ids_of(
    causal: bool, prompts: Sequence[Sequence[int]], config: SamplerConfig
) -> list[list[int]]:
    return [result.token_ids for result in generate(tiny(causal), prompts, config)]


def last_logits(network: Transformer, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return network.head(network(torch.tensor([ids]))[:, -1:])


# Autoregressive


def one_by_one(
    network: Transformer, prompt: list[int], row: int, config: SamplerConfig
) -> list[int]:
    """Without a cache, batch or padding: the whole text again for each token."""
    draws = uniform(config.seed, Purpose.SAMPLER_TOKEN, torch.tensor([row]), config.max_new_tokens)
    new: list[int] = []
    for place in range(config.max_new_tokens):
        seen = torch.zeros(1, 29, dtype=torch.bool)
        seen[0, new] = True
        logits = penalize_repetition(
            last_logits(network, [*(prompt or [EOS]), *new]), seen, config.repetition_penalty
        )
        new.append(int(choose_tokens(logits, config, draws[:, place : place + 1])))
    return new


@settings(max_examples=10)
@given(
    LENGTHS, st.sampled_from([0.0, 1.0]), st.sampled_from([1.0, 1.7]), st.sampled_from([1, 2, 32])
)
def test_ar_equals_the_whole_text_again_for_each_token(
    lengths: list[int], temperature: float, penalty: float, batch_size: int
) -> None:
    config = dataclasses.replace(
        CONFIG, temperature=temperature, repetition_penalty=penalty, batch_size=batch_size, seed=3
    )
    prompts = prompts_of(lengths)
    alone = [
        one_by_one(tiny(True).transformer, prompt, row, config)
        for row, prompt in enumerate(prompts)
    ]
    assert ids_of(True, prompts, config) == alone


@pytest.mark.parametrize("change", [{"temperature": 1.0}, {"repetition_penalty": 3.0}], ids=str)
def test_the_settings_of_that_comparison_matter(change: dict[str, Any]) -> None:
    prompts = prompts_of([0, 4, 9])
    assert ids_of(True, prompts, CONFIG) != ids_of(
        True, prompts, dataclasses.replace(CONFIG, **change)
    )


def test_ar_equals_transformers_greedy_generation() -> None:
    llama = llama_of(tiny(True).transformer)
    config = dataclasses.replace(CONFIG, max_new_tokens=20)
    prompts = prompts_of([1, 4, 11])
    for prompt, ours in zip(prompts, ids_of(True, prompts, config), strict=True):
        tokens = torch.tensor([prompt])
        theirs = llama.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=3,
        )
        assert theirs[0, len(prompt) :].tolist() == ours


def test_ar_stops_at_an_end_token_and_once_all_rows_have() -> None:
    prompts = prompts_of([2, 5])
    network = tiny(True).transformer
    free = ids_of(True, prompts, CONFIG)
    stops = (free[0][2], free[1][3])
    passes: list[int] = []
    handle = network.lm_head.register_forward_pre_hook(
        lambda module, inputs: passes.append(len(inputs[0]))
    )
    results = generate(tiny(True), prompts, dataclasses.replace(CONFIG, eos_token_ids=stops))
    handle.remove()
    ends = [min(ids.index(stop) for stop in stops if stop in ids) for ids in free]
    assert len(passes) == max(ends) + 1 < CONFIG.max_new_tokens
    for result, ids, end in zip(results, free, ends, strict=True):
        assert (result.token_ids, result.finish_reason) == (ids[:end], "stop")
        assert result.decoded_ids == ids[: end + 1]
        assert result.latents is None


# Masked diffusion


def all_at_once(
    network: Transformer, prompt: list[int], row: int, config: SamplerConfig
) -> list[int]:
    """LLaDA's algorithm 5 for one prompt, in loops over positions."""
    new, mask = config.max_new_tokens, network.mask_token_id
    num_steps, per_step = min(config.num_steps, new), 4 * math.ceil(new / 4)
    draws = uniform(config.seed, Purpose.SAMPLER_TOKEN, torch.tensor([row]), num_steps * per_step)
    block = [mask] * new
    for step in range(num_steps):
        with torch.no_grad():
            logits = network.head(network(torch.tensor([[*(prompt or [EOS]), *block]])))[0, -new:]
        found: dict[int, tuple[float, int]] = {}
        for place in range(new):
            if block[place] == mask:
                draw = draws[:, step * per_step + place :][:, :1]
                token = int(choose_tokens(logits[None, place : place + 1], config, draw))
                found[place] = (float(logits[place].softmax(0)[token]), token)
        more = math.floor(new * (step + 1) / num_steps) - (new - len(found))
        for place in sorted(found, key=lambda place: -found[place][0])[:more]:
            block[place] = found[place][1]
    return block


@settings(max_examples=15)
@given(
    LENGTHS,
    st.sampled_from([0.0, 1.0]),
    st.integers(1, 9),
    st.integers(1, 7),
    st.sampled_from([1, 2, 32]),
)
def test_llada_equals_loops_over_each_prompt_alone(
    lengths: list[int], temperature: float, new: int, num_steps: int, batch_size: int
) -> None:
    config = dataclasses.replace(
        CONFIG,
        temperature=temperature,
        max_new_tokens=new,
        num_steps=num_steps,
        batch_size=batch_size,
        seed=3,
    )
    prompts = prompts_of(lengths)
    alone = [
        all_at_once(tiny(False).transformer, prompt, row, config)
        for row, prompt in enumerate(prompts)
    ]
    assert ids_of(False, prompts, config) == alone


@pytest.mark.parametrize(
    "change", [{"temperature": 1.0}, {"num_steps": 1}, {"num_steps": 7}], ids=str
)
def test_the_settings_of_that_comparison_matter_too(change: dict[str, Any]) -> None:
    prompts = prompts_of([0, 4, 9])
    assert ids_of(False, prompts, CONFIG) != ids_of(
        False, prompts, dataclasses.replace(CONFIG, **change)
    )


@pytest.mark.parametrize(("new", "num_steps"), [(7, 3), (7, 7), (5, 16), (6, 1)])
def test_each_step_commits_for_good_and_the_last_leaves_no_mask(new: int, num_steps: int) -> None:
    network, prompts = tiny(False).transformer, prompts_of([3, 3])
    rows: list[Tensor] = []
    handle = network.model.embed_tokens.register_forward_pre_hook(
        lambda module, inputs: rows.append(inputs[0][:, 3:])
    )
    ids = ids_of(
        False, prompts, dataclasses.replace(CONFIG, max_new_tokens=new, num_steps=num_steps)
    )
    handle.remove()
    steps = min(num_steps, new)
    assert [(row == 29).sum(1).tolist() for row in rows] == [
        [new - new * step // steps] * 2 for step in range(steps)
    ]
    for before, after in zip(rows, [*rows[1:], torch.tensor(ids)], strict=True):
        assert torch.equal(after[before != 29], before[before != 29])
    assert not (torch.tensor(ids) == 29).any()


def test_llada_ends_its_text_at_an_end_token() -> None:
    prompts = prompts_of([2, 5])
    free = ids_of(False, prompts, CONFIG)
    results = generate(
        tiny(False), prompts, dataclasses.replace(CONFIG, eos_token_ids=(free[0][3],))
    )
    for result, ids in zip(results, free, strict=True):
        end = [*ids, free[0][3]].index(free[0][3])
        assert result.token_ids == ids[:end]
        assert result.finish_reason == ("stop" if end < len(ids) else "length")
        assert result.latents is None


# Both


@pytest.mark.parametrize("causal", [True, False])
def test_guidance_does_not_apply(causal: bool) -> None:
    prompts = prompts_of([0, 4])
    assert ids_of(causal, prompts, CONFIG) == ids_of(
        causal, prompts, dataclasses.replace(CONFIG, guidance_scale=1.0)
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("knob", "message"),
    [
        (
            {"noise_scale": 0.5},
            r"noise_scale \(0.5\) is .* of Cola DLM's .* leave it at 1.0",
        ),
        ({"history": "reencoded"}, r"history \(reencoded\) is .* leave it at generated"),
    ],
)
def test_settings_of_latents_are_refused_by_name(
    causal: bool, knob: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(tiny(causal), prompts_of([4]), dataclasses.replace(CONFIG, **knob))


@pytest.mark.parametrize("causal", [True, False])
def test_texts_and_ids_are_prompts_alike(causal: bool) -> None:
    text, ids = generate(
        tiny(causal), ["w5 w6", [5, 6]], dataclasses.replace(CONFIG, temperature=0.0)
    )
    assert text == ids
    assert text.text == tiny(causal).tokenizer.decode(text.token_ids)
    with pytest.raises(
        UserError, match=r"prompt 0: id 29 at position 1 is outside the vocabulary, 0\.\.28\."
    ):
        generate(tiny(causal), [[5, 29]], CONFIG)


@pytest.mark.parametrize("causal", [True, False])
def test_more_tokens_than_training_saw_warns(causal: bool) -> None:
    checkpoint = dataclasses.replace(tiny(causal), training={"seq_len": 9})
    with pytest.warns(UserWarning, match=r"come to 10 tokens; this model was trained on rows of 9"):
        generate(checkpoint, prompts_of([3]), CONFIG)


@pytest.mark.parametrize("causal", [True, False])
def test_the_sample_verb_takes_a_baselines_folder(
    causal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny(causal).save(tmp_path / "hf")
    sample(tmp_path, ["w5 w6"], None, None, "cpu", CONFIG)
    (result,) = generate(tiny(causal), ["w5 w6"], CONFIG)
    assert capsys.readouterr().out == f"w5 w6|{result.text}\n[length, 7 tokens]\n\n"

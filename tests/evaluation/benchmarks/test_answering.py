"""Answers do not depend on what else is asked; the option that is chosen is the likeliest one."""

import copy
import dataclasses
import hashlib
import random
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.evaluation import EvaluationConfig, LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks import answering
from cola_train.evaluation.benchmarks.answering import answer, draws_address, make_batches
from cola_train.evaluation.benchmarks.prompts import build_prompt
from cola_train.evaluation.benchmarks.tasks import TASKS, Sample
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.sampling import precision
from tests.helpers.benchmarks import FAMILIES, byte_tokenizer, make_samples, reader
from tests.helpers.tiny import random_latents

SAMPLER = SamplerConfig(num_steps=3, max_new_tokens=9, batch_size=16)
CONFIG = EvaluationConfig(sampler=SAMPLER)


def alone(config: EvaluationConfig) -> EvaluationConfig:
    return dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, batch_size=1))


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_prompts_of_mixed_length_give_the_same_tokens_in_batches_and_one_at_a_time(
    family: str,
) -> None:
    """fp32; Cola DLM's noise is put in. The prompts come sorted by length, as `make_batches` sorts
    them.
    """
    checkpoint, samples = reader(family), make_samples("lambada", 50)
    whole = dataclasses.replace(CONFIG, sampler=dataclasses.replace(SAMPLER, batch_size=50))
    (batch,) = make_batches(checkpoint.tokenizer, "lambada", samples, whole)
    prompts = [question.prompt for question in batch]
    lengths = [len(checkpoint.tokenizer.encode(prompt)) for prompt in prompts]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 35
    places = list(range(900, 950))

    def noise(index: int, block: int) -> torch.Tensor:
        return random_latents(4, 4, seed=1000 * index + block)

    put_in = noise if family == "cola" else None
    batched = generate(checkpoint, prompts, SAMPLER, put_in, places)
    one_by_one = [
        generate(checkpoint, [prompt], SAMPLER, put_in, [place])[0]
        for prompt, place in zip(prompts, places, strict=True)
    ]
    assert [result.decoded_ids for result in batched] == [
        result.decoded_ids for result in one_by_one
    ]
    assert len({tuple(result.decoded_ids) for result in batched}) > 15


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_whatever_else_is_asked(family: str) -> None:
    checkpoint, samples = (
        reader(family),
        make_samples("siqa", 12) + make_samples("siqa", 30, seed=1)[12:],
    )
    config = dataclasses.replace(
        CONFIG, sampler=dataclasses.replace(SAMPLER, batch_size=5, temperature=1.0)
    )
    answers = {found.id: found for found in answer(checkpoint, "siqa", samples, config)}
    assert [*answers] != [sample.id for sample in samples], "they come by length"
    assert {*answers} == {sample.id for sample in samples}
    some = random.Random(1).sample(samples, 6)
    assert {found.id: found for found in answer(checkpoint, "siqa", some, alone(config))} == {
        one.id: answers[one.id] for one in some
    }
    for sample in some:
        found = answers[sample.id]
        assert (found.ground_truth, found.choices, found.scores) == (
            sample.ground_truth,
            sample.choices,
            (),
        )
        assert (
            found.prompt_sha256 == hashlib.sha256(build_prompt("siqa", sample).encode()).hexdigest()
        )


def test_a_generation_is_the_text_of_all_tokens_with_special_ones() -> None:
    """Also of those after the end of the text, up to the block's end."""
    checkpoint, samples = reader("cola"), make_samples("lambada", 40)
    assert isinstance(checkpoint, Checkpoint)
    with torch.no_grad():
        checkpoint.vae.decoder.final_layer.bias[checkpoint.tokenizer.eos_token_id] += 1.5
    found = [*answer(checkpoint, "lambada", samples, CONFIG)]
    cut = [one.generation for one in found if "<|endoftext|>" in one.generation]
    assert cut
    assert any(not text.endswith("<|endoftext|>") for text in cut)
    for one in found:
        sample = samples[int(one.id) - 1]
        (result,) = generate(
            checkpoint,
            [sample.question],
            SAMPLER,
            prompt_indices=[draws_address("lambada", one.id)],
        )
        assert one.generation == checkpoint.tokenizer.decode(
            result.decoded_ids, special_tokens=True
        )


def test_batches_hold_every_sample_once_by_falling_length() -> None:
    samples = make_samples("race", 23)
    batches = make_batches(
        byte_tokenizer(),
        "race",
        samples,
        dataclasses.replace(CONFIG, sampler=SamplerConfig(batch_size=4)),
    )
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 3]
    questions = [question for batch in batches for question in batch]
    assert sorted(question.place for question in questions) == list(range(23))
    assert all(samples[question.place] is question.sample for question in questions)
    lengths = [len(build_prompt("race", question.sample).encode()) for question in questions]
    assert (
        [question.num_tokens for question in questions] == lengths == sorted(lengths, reverse=True)
    )


IDS = st.integers() | st.text(st.characters(exclude_categories=["Cs"]))


@given(st.sampled_from(TASKS), IDS, st.sampled_from(TASKS), IDS)
def test_every_sample_has_an_address_of_its_own(
    task: str, name: int | str, other_task: str, other: int | str
) -> None:
    assert 0 <= draws_address(task, name) < 2**62
    same = (task, name) == (other_task, other)
    assert (draws_address(task, name) == draws_address(other_task, other)) == same


def test_addresses_are_part_of_an_evaluations_identity() -> None:
    # printf '["lambada", 1]' | sha256sum
    assert draws_address("lambada", 1) == 0x6A99F17C8E598F5A >> 2
    assert draws_address("lambada", 1) != draws_address("lambada", "1")


def test_prompts_longer_than_training_saw_are_answered_without_a_word_a_batch(
    recwarn: pytest.WarningsRecorder,
) -> None:
    checkpoint = reader("ar")
    checkpoint.training = {"seq_len": 8}
    assert len([*answer(checkpoint, "lambada", make_samples("lambada", 3), alone(CONFIG))]) == 3
    assert not recwarn.list


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_cast_once_for_all_batches(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, samples, cast = reader(family), make_samples("lambada", 6), []

    def deepcopy(network: object, memo: dict[int, object]) -> object:
        cast.append(network)
        return copy.deepcopy(network, memo)

    monkeypatch.setattr(precision, "copy", types.SimpleNamespace(deepcopy=deepcopy))
    config = dataclasses.replace(
        CONFIG, sampler=dataclasses.replace(SAMPLER, batch_size=2, precision="bf16")
    )
    assert len(make_batches(checkpoint.tokenizer, "lambada", samples, config)) == 3
    answers = [*answer(checkpoint, "lambada", samples, config)]
    assert len(cast) == len(checkpoint.networks)
    # What another checkpoint has cast is nothing to this one, whose weights may be others.
    assert [*answer(dataclasses.replace(checkpoint), "lambada", samples, config)] == answers
    assert len(cast) == 2 * len(checkpoint.networks)


# Options chosen by likelihood


def log_likelihood(
    checkpoint: TransformerCheckpoint, prompt: str, option: str
) -> tuple[float, int]:
    """log P(option | prompt) of an autoregressive model, of a text that begins after a separator,
    and the option's tokens.
    """
    before, after = (checkpoint.tokenizer.encode(text) for text in (prompt, option))
    before = [checkpoint.tokenizer.eos_token_id, *before]
    with torch.no_grad():
        logits = checkpoint.transformer.head(
            checkpoint.transformer(torch.tensor([before + after]))
        )[0]
    nats = F.log_softmax(logits.double(), dim=-1)
    return sum(
        float(nats[len(before) - 1 + place, token]) for place, token in enumerate(after)
    ), len(after)


@pytest.mark.parametrize("choose_by", ["likelihood", "likelihood_per_token"])
def test_the_likeliest_option_is_chosen(choose_by: str) -> None:
    checkpoint, samples = reader("ar"), make_samples("hellaswag", 11)
    assert isinstance(checkpoint, TransformerCheckpoint)
    config = dataclasses.replace(CONFIG, choose_by=choose_by, sampler=SamplerConfig(batch_size=4))
    found = {one.id: one for one in answer(checkpoint, "hellaswag", samples, config)}
    for sample in samples:
        pairs = [
            log_likelihood(checkpoint, build_prompt("hellaswag", sample), f" {choice}")
            for choice in sample.choices
        ]
        expected = [
            nats / length if choose_by == "likelihood_per_token" else nats for nats, length in pairs
        ]
        assert found[sample.id].scores == pytest.approx(expected, abs=1e-3)
        assert (
            found[sample.id].generation == sample.choices[max(range(4), key=expected.__getitem__)]
        )


def test_benchmarks_without_options_are_generated_all_the_same() -> None:
    checkpoint, samples = reader("ar"), make_samples("squad", 3)
    chosen = dataclasses.replace(CONFIG, choose_by="likelihood")
    assert [*answer(checkpoint, "squad", samples, chosen)] == [
        *answer(checkpoint, "squad", samples, CONFIG)
    ]


def test_options_of_a_sample_share_their_noise() -> None:
    """Two equal options are equally likely, by a bound that is random."""
    checkpoint, choices = reader("cola"), ("the ball", "a letter", "the ball")
    samples = [Sample(number, "He spoke of", "a letter", choices) for number in (1, 2)]
    likelihood = LikelihoodConfig(num_samples=1)
    config = dataclasses.replace(CONFIG, choose_by="likelihood", likelihood=likelihood)
    first, second = answer(checkpoint, "obqa", samples, config)
    assert first.scores[0] == first.scores[2]
    assert first.scores[0] != pytest.approx(second.scores[0], abs=1e-3), (
        "of other samples other noise"
    )


def test_likelihoods_that_are_not_finite_choose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(
        checkpoint: Checkpoint, pairs: list[object], config: object, keys: list[int]
    ) -> list[float]:
        return [float("nan")] * len(pairs)

    monkeypatch.setattr(answering, "conditional_scores", lost)
    with pytest.raises(
        UserError,
        match=(
            r"likelihoods of the options of siqa 1 are not finite: \(nan, nan, nan\)\. The "
            r"checkpoint may"
        ),
    ):
        list(
            answer(
                reader("ar"),
                "siqa",
                make_samples("siqa", 1),
                dataclasses.replace(CONFIG, choose_by="likelihood"),
            )
        )

"""Continuous batching: a plain simulation, and what texts get that share rows with others before
and after them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_train import Checkpoint, SamplerConfig, generate
from cola_train.config.sampling import History
from cola_train.sampling.stream import GeneratedPart, stream
from tests.helpers.compare import assert_near
from tests.helpers.llama import tiny_baseline
from tests.helpers.tiny import random_tokens, tiny_checkpoint, tiny_dit, tiny_vae


class Counting:
    """Counts up from each prompt's only id; keeps a diary of the prompts in flight."""

    def __init__(self, prompts: Sequence[Sequence[int]], indices: Sequence[int]) -> None:
        self.rows = [(prompt[0], index) for prompt, index in zip(prompts, indices, strict=True)]
        self.diary: list[list[int]] = []

    def next_parts(self) -> list[GeneratedPart]:
        self.diary.append([index for _, index in self.rows])
        self.rows = [(last + 1, index) for last, index in self.rows]
        return [GeneratedPart([last]) for last, _ in self.rows]

    def keep(self, rows: Sequence[int]) -> None:
        assert list(rows) == sorted(rows)
        self.rows = [self.rows[row] for row in rows]

    def admit(self, prompts: Sequence[Sequence[int]], indices: Sequence[int]) -> None:
        self.rows += [(prompt[0], index) for prompt, index in zip(prompts, indices, strict=True)]


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 5))
def test_rows_are_filled_as_they_fall_free_and_texts_are_given_in_order(
    starts: list[int], batch_size: int
) -> None:
    """Counting from s ends at 10, that is after 10 - s passes, or after 6."""
    config = SamplerConfig(max_new_tokens=6, batch_size=batch_size)
    generations: list[Counting] = []

    def begin(prompts: Sequence[Sequence[int]], indices: Sequence[int]) -> Counting:
        generations.append(Counting(prompts, indices))
        return generations[-1]

    given_after = []
    for place, text in enumerate(
        stream(begin, [[s] for s in starts], range(100, 100 + len(starts)), config, frozenset({10}))
    ):
        assert text.place == place
        assert text.tokens == list(range(starts[place] + 1, 11))[:6]
        given_after.append(len(generations[0].diary))
    assert len(given_after) == len(starts)
    assert len(generations) == bool(starts)

    # Each prompt takes the row that falls free first.
    free, ends = [0] * batch_size, []
    for start in starts:
        row = free.index(min(free))
        free[row] += min(10 - start, 6)
        ends.append(free[row])
    assert given_after == [max(ends[: place + 1]) for place in range(len(ends))]
    for passed, in_flight in enumerate(generations[0].diary if starts else []):
        expected = [
            100 + place
            for place, end in enumerate(ends)
            if end - min(10 - starts[place], 6) <= passed < end
        ]
        assert sorted(in_flight) == expected


@functools.cache
def tiny() -> Checkpoint:
    # not calmed: its texts have few ids in common, so stops fall anywhere
    return tiny_checkpoint(tiny_vae(), tiny_dit())


def many_prompts() -> list[list[int]]:
    return [
        random_tokens(1, length, seed=length)[0].tolist() for length in (9, 0, 3, 13, 4, 1, 8, 6)
    ]


@settings(max_examples=6)
@given(
    st.integers(2, 5),
    st.sampled_from([0.0, 1.0]),
    st.sets(st.integers(4, 28), min_size=2, max_size=5),
    st.sampled_from(get_args(History)),
)
def test_blocks_are_what_each_prompt_gets_alone(
    batch_size: int, temperature: float, stops: set[int], history: History
) -> None:
    config = SamplerConfig(
        history=history,
        num_steps=2,
        max_new_tokens=14,
        eos_token_ids=tuple(stops),
        guidance_scale=2.0,
        temperature=temperature,
        batch_size=batch_size,
    )
    together = generate(tiny(), many_prompts(), config)
    for one, alone in zip(
        together,
        generate(tiny(), many_prompts(), dataclasses.replace(config, batch_size=1)),
        strict=True,
    ):
        assert (one.token_ids, one.decoded_ids, one.finish_reason) == (
            alone.token_ids,
            alone.decoded_ids,
            alone.finish_reason,
        )
        assert_near(one.latents, alone.latents, 1e-4)


@settings(max_examples=6)
@given(
    st.integers(2, 5),
    st.sampled_from([0.0, 1.0]),
    st.sets(st.integers(4, 28), min_size=2, max_size=5),
)
def test_tokens_are_what_each_prompt_gets_alone(
    batch_size: int, temperature: float, stops: set[int]
) -> None:
    config = SamplerConfig(
        max_new_tokens=14,
        eos_token_ids=tuple(stops),
        temperature=temperature,
        batch_size=batch_size,
    )
    together = generate(tiny_baseline(True), many_prompts(), config)
    alone = generate(tiny_baseline(True), many_prompts(), dataclasses.replace(config, batch_size=1))
    assert [(one.token_ids, one.decoded_ids) for one in together] == [
        (one.token_ids, one.decoded_ids) for one in alone
    ]


def test_ended_texts_take_no_part_in_passes_and_others_take_their_rows() -> None:
    """Rows of each pass over a block, read off what the texts turn out to be."""
    config = SamplerConfig(
        num_steps=1, max_new_tokens=14, eos_token_ids=(5, 9, 17), guidance_scale=1.0, batch_size=3
    )
    dit = tiny().dit
    assert dit is not None
    rows: list[int] = []
    handle = dit.register_forward_hook(
        lambda module, inputs, out: rows.append(len(out)) if out.shape[1] else None
    )
    results = generate(tiny(), many_prompts(), config)
    handle.remove()
    opening = [len(result.prompt_ids) % 4 for result in results]
    blocks = [
        -(-(known + len(result.decoded_ids)) // 4)
        for known, result in zip(opening, results, strict=True)
    ]
    assert len(set(blocks)) >= 3
    free, spans = [0] * 3, []
    for count in blocks:
        row = free.index(min(free))
        spans.append(range(free[row], free[row] + count))
        free[row] += count
    assert rows == [sum(block in span for span in spans) for block in range(max(free))]
    assert sum(rows) == sum(blocks)


def test_a_cache_has_no_more_rows_than_it_was_allocated() -> None:
    dit = tiny().dit
    assert dit is not None
    cache, other = dit.new_cache(2, 8), dit.new_cache(1, 8)
    with pytest.raises(AssertionError, match="cache of 2 rows, 3 needed"):
        cache.append(other)


def test_rows_that_are_kept_move_up_and_new_ones_come_behind() -> None:
    dit = tiny().dit
    assert dit is not None
    cache, other = dit.new_cache(3, 8), dit.new_cache(1, 4)
    cache.keys.copy_(torch.arange(3.0)[:, None, None, None].expand_as(cache.keys[0]))
    other.keys.fill_(7.0)
    cache.lengths, other.lengths = [4, 8, 4], [4]
    cache.keep([0, 2])
    cache.append(other)
    assert cache.lengths == [4, 4, 4]
    assert cache.keys[:, :, :4].flatten(2).unique(dim=2)[0].flatten().tolist() == [0.0, 2.0, 7.0]

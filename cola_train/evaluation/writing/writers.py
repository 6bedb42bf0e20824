"""Checkpoints as writers of continuations, in the ids of the openings' tokenizer."""

import dataclasses
from collections.abc import Sequence

from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.writing.comparison import Generator, Writer
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.translation import Translation
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate

_MOST_TOKENS = 8  # of another tokenizer, for one of the openings'


def writer_of(checkpoint: Checkpoint, tokenizer: Tokenizer, config: ComparisonConfig) -> Writer:
    """A checkpoint that continues openings in the ids of `tokenizer`, greedily and as it samples.

    One of another tokenizer is given the openings as text, and its text is encoded anew.
    """
    same = checkpoint.tokenizer.sha256 == tokenizer.sha256

    def by(sampler: SamplerConfig) -> Generator:
        def continue_all(prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
            settings = dataclasses.replace(sampler, max_new_tokens=num_new)
            if not same:
                return _through_text(checkpoint, tokenizer, prompts, settings)
            return [result.token_ids for result in generate(checkpoint, prompts, settings)]

        return continue_all

    return by(config.greedy), by(config.sampler)


def _through_text(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampler: SamplerConfig,
) -> list[list[int]]:
    """Up to `sampler.max_new_tokens` ids of `tokenizer` after each prompt of such ids.

    A text that comes to fewer without having ended is written again, twice as long.
    """
    num_new = sampler.max_new_tokens
    openings = [Translation.of(prompt, tokenizer, checkpoint.tokenizer).ids for prompt in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    waiting, longer = [*range(len(prompts))], num_new
    while waiting and longer <= _MOST_TOKENS * num_new:
        settings = dataclasses.replace(sampler, max_new_tokens=longer)
        some = [openings[place] for place in waiting]
        results = generate(checkpoint, some, settings, prompt_indices=waiting)
        short = []
        for place, result in zip(waiting, results, strict=True):
            ids = tokenizer.encode_document(result.text)
            texts[place] = ids[:num_new]
            if result.finish_reason == "length" and len(ids) < num_new:
                short.append(place)
        waiting, longer = short, 2 * longer
    return texts

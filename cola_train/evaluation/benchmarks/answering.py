"""Answering benchmarks in memory, in batches of prompts, by generation or by likelihood."""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence

from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.benchmarks.answers import Answer, Key
from cola_train.evaluation.benchmarks.prompts import build_prompt
from cola_train.evaluation.benchmarks.tasks import Sample
from cola_train.evaluation.likelihood.likelihood import conditional_scores
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate


@dataclasses.dataclass(frozen=True)
class Question:
    """A sample as the model reads it.

    Attributes:
        place: of the sample among those of its task.
        num_tokens: of the prompt, and of its longest choice where one is to be chosen.
    """

    task: str
    sample: Sample
    place: int
    prompt: str
    num_tokens: int

    @property
    def key(self) -> Key:
        """The sample's task and id."""
        return self.task, self.sample.id

    def answered(self, text: str, scores: tuple[float, ...] = ()) -> Answer:
        """The answer of this text, and of these scores of the choices."""
        truth, choices = self.sample.ground_truth, self.sample.choices
        sha256 = hashlib.sha256(self.prompt.encode()).hexdigest()
        return Answer(*self.key, text, truth, choices, scores, sha256)


def answer(
    checkpoint: Checkpoint, task: str, samples: Sequence[Sample], config: EvaluationConfig
) -> Iterator[Answer]:
    """Answer samples of one task batch by batch, those with the longest prompts first.

    An answer depends on the checkpoint, its sample and the settings; on what else is asked only by
    rounding.

    Raises:
        UserError: a checkpoint without a DiT, or options whose likelihood is not finite.
    """
    for batch in make_batches(checkpoint.tokenizer, task, samples, config):
        yield from answer_batch(checkpoint, batch, config)


def make_batches(
    tokenizer: Tokenizer, task: str, samples: Sequence[Sample], config: EvaluationConfig
) -> list[list[Question]]:
    """All of a task in batches of `config.sampler.batch_size`, in descending length.

    A batch is the same wherever and whenever it is answered, so that even rounding is.
    """
    questions = []
    for place, sample in enumerate(samples):
        prompt = build_prompt(task, sample)
        num_tokens = len(tokenizer.encode(prompt))
        if config.choose_by != "generation" and sample.choices:
            num_tokens += max(len(tokenizer.encode(f" {choice}")) for choice in sample.choices)
        questions.append(Question(task, sample, place, prompt, num_tokens))
    questions.sort(key=lambda question: -question.num_tokens)
    size = config.sampler.batch_size
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def answer_batch(
    checkpoint: Checkpoint, batch: Sequence[Question], config: EvaluationConfig
) -> list[Answer]:
    """The answers to a batch of `make_batches`, in its order; errors as of `answer`."""
    if config.choose_by != "generation" and batch[0].sample.choices:
        return _choose(checkpoint, batch, config)
    addresses = [draws_address(*question.key) for question in batch]
    prompts = [question.prompt for question in batch]
    # Long prompts would be warned of for each batch; the caller of all batches warns once.
    results = generate(
        checkpoint, prompts, config.sampler, prompt_indices=addresses, warn_if_long=False
    )
    return [
        question.answered(checkpoint.tokenizer.decode(result.decoded_ids, special_tokens=True))
        for question, result in zip(batch, results, strict=True)
    ]


def draws_address(task: str, sample_id: int | str) -> int:
    """The address of a sample's noise, in [0, 2^62): the same in any batch, order and process."""
    digest = hashlib.sha256(json.dumps([task, sample_id]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _choose(
    checkpoint: Checkpoint, batch: Sequence[Question], config: EvaluationConfig
) -> list[Answer]:
    encode = checkpoint.tokenizer.encode
    pairs, keys = [], []
    for question in batch:
        prompt = encode(question.prompt)
        for choice in question.sample.choices:
            # Every template ends in a cue without a space.
            pairs.append((prompt, encode(f" {choice}")))
            # The same for all options of a sample: shared noise does not decide between them.
            keys.append(draws_address(*question.key))
    found = conditional_scores(checkpoint, pairs, config.likelihood, keys)
    if config.choose_by == "likelihood_per_token":
        found = [score / max(1, len(ids)) for score, (_, ids) in zip(found, pairs, strict=True)]
    answers, rest = [], iter(found)
    for question in batch:
        choices = question.sample.choices
        scores = tuple(itertools.islice(rest, len(choices)))
        require(
            all(map(math.isfinite, scores)),
            f"The likelihoods of the options of {question.task} {question.sample.id} are not "
            f"finite: {scores}. The checkpoint may have diverged; look at it with `cola-train "
            "inspect`, or choose_by=generation.",
        )
        answers.append(question.answered(choices[scores.index(max(scores))], scores))
    return answers

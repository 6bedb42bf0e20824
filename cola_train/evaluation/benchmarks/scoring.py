"""Whether an answer counts as correct: exactly the rules of the released scorer.

The answer is cut after its first line (`truncate`). lambada compares first words; hellaswag, squad
and story_cloze compare whole texts; mmlu, obqa, race and siqa look for a choice, by its letter
(`_letter_rule`) or its text (`_text_rule`). All comparisons are of Unicode code points, and `\\s`,
`\\w` and `\\b` are Python's own classes.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence

from cola_train.config.settings import require
from cola_train.evaluation.benchmarks.tasks import MOST_CHOICES, check_task

LETTER_TASKS = ("mmlu", "obqa", "race", "siqa")
_CLOSE_ENOUGH = 0.9  # similarity of a text to the choice that it is taken for
_BARE_LETTERS_WITHIN = 40  # code points: in a longer text a letter in brackets is no answer

_LINK = r"(?i:is|[=:：])"
# Possessive `\s*+` keeps a match linear in a text of many spaces. What follows one never begins
# with a space: nothing else changes.
_ANSWER = re.compile(r"\b(?i:final\s++answer|answer)\b")
_LETTER_ALONE = re.compile(r"[(\[]?\s*+([A-Za-z])\s*+[)\]]?\.?")
_LETTER_AFTER_KEY = re.compile(
    rf"\b(?i:final\s++answer|answer|option|choice)\b\s*+{_LINK}?\s*+[(\[]?\s*+([A-Za-z])(?:\s*[)\]])?(?=[\s.,;:!?]|\Z)"
)
_LETTER_IN_BRACKETS = re.compile(r"[(\[]\s*+([A-Za-z])\s*+[)\]]")
_OPENING = re.compile(
    rf"(?i:the\s++)?(?i:correct\s++)?(?i:final\s++)?(?i:answer|option|choice)\b\s*+{_LINK}?\s*+"
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How an answer was judged.

    Attributes:
        score: 1.0 where letters agree, in lambada 1.0 or 0.0, else the similarity of text and
            ground truth, 0 to 1.
        text: the part of the generation that was judged.
        predicted: the letter of the choice that the text was taken for, None if for none; in
            lambada the text's first word.
        gold: the same of the ground truth.
    """

    correct: bool
    score: float
    text: str
    predicted: str | None = None
    gold: str | None = None


def is_correct(
    task: str,
    generation: str | None,
    ground_truth: str | None,
    choices: Sequence[str] | None = None,
) -> bool:
    """Whether `generation` answers a sample of `task`; see `verdict`.

    Raises:
        UserError: an unknown task.
    """
    return verdict(task, generation, ground_truth, choices).correct


def verdict(
    task: str,
    generation: str | None,
    ground_truth: str | None,
    choices: Sequence[str] | None = None,
) -> Verdict:
    """Judge one answer.

    Args:
        task: one of `tasks.TASKS`.
        generation: the text of all generated tokens, special tokens as text; None counts as "".
        ground_truth: the gold answer; None counts as "".
        choices: the options in order, of which the first 26 count; used in mmlu, obqa, race, siqa.

    Raises:
        UserError: an unknown task, or one text in place of a list of choices.
    """
    check_task(task)
    require(
        not isinstance(choices, str),
        f'choices must be a list of texts, for example ["yes", "no"], not one text: {choices!r}.',
    )
    text, truth = truncate(generation or ""), ground_truth or ""
    if task == "lambada":
        word, gold_word = (norm(whole).partition(" ")[0] for whole in (text, truth))
        return Verdict(word == gold_word, float(word == gold_word), text, word, gold_word)
    alike = similarity(text, truth)
    if task not in LETTER_TASKS:
        return Verdict(alike >= 1.0, alike, text)
    options = tuple(choices or ())[:MOST_CHOICES]
    predicted = _letter(_segment(text), options) or _letter(text, options)
    gold = _letter(truth, options)
    agree = predicted is not None and predicted == gold
    return Verdict(agree or alike >= 1.0, 1.0 if agree else alike, text, predicted, gold)


def truncate(generation: str) -> str:
    """The text before the first line feed that has a word character before it, or all of it."""
    return re.sub(r"(\w.*)(?s:.*)", r"\1", generation)


def norm(text: str) -> str:
    """Lower case, word characters and spaces alone, words joined by single spaces."""
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def similarity(x: str, y: str) -> float:
    """Ratcliff/Obershelp's ratio of the normalized texts, 0 to 1, by difflib's rules.

    The order matters, and where `y` has 200 code points or more, its popular characters begin no
    block (unless both parts begin with one).
    """
    return difflib.SequenceMatcher(None, norm(x), norm(y)).ratio()


def letter(index: int) -> str:
    """The letter that a choice is shown with: A of choice 0."""
    return chr(ord("A") + index)


def _letter(text: str, choices: Sequence[str]) -> str | None:
    return _letter_rule(text, len(choices)) or _text_rule(text, choices)


def _segment(text: str) -> str:
    """The answer that the last line with "answer" gives, or else the whole text."""
    stripped = text.strip()
    for line in reversed(stripped.splitlines()):
        for key in _ANSWER.finditer(line):
            rest = line[key.end() :].strip()
            if rest:
                return re.sub(rf"\A{_LINK}", "", rest).strip() or rest
    return stripped


def _letter_rule(text: str, num_choices: int) -> str | None:
    """A choice's letter in the text: alone, the last after a key word, or the last in brackets."""
    stripped = text.strip()
    alone = _LETTER_ALONE.fullmatch(stripped)
    candidates = [alone[1]] if alone else []
    candidates += _LETTER_AFTER_KEY.findall(stripped)[-1:]
    if len(stripped) <= _BARE_LETTERS_WITHIN:
        candidates += _LETTER_IN_BRACKETS.findall(stripped)[-1:]
    letters = [letter(index) for index in range(num_choices)]
    return next((found for found in map(str.upper, candidates) if found in letters), None)


def _text_rule(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that the text repeats.

    That is the choice that is equal, equal but for an opening ("The answer is"), the only one
    contained in the text, or the first of the most similar.
    """
    options = [norm(choice) for choice in choices]
    opening = _OPENING.match(text)
    answer = (text[opening.end() :] if opening else text).strip()
    for whole in (norm(text), norm(answer)):
        if not whole:
            return None
        if whole in options:
            return letter(options.index(whole))
    contained = [index for index, option in enumerate(options) if option and option in whole]
    if len(contained) == 1:
        return letter(contained[0])
    ratios = [similarity(answer, choice) for choice in choices]
    best = max(ratios, default=0.0)
    return letter(ratios.index(best)) if best >= _CLOSE_ENOUGH else None

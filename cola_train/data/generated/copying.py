"""Copies: a word, a bar, the same word."""

import random
import string

from cola_train.data.generated.language import Language


def _write(draws: random.Random, most_bytes: int) -> str:
    """A word of 1 to (most_bytes - 1) // 2 letters, each length as likely, and its copy."""
    length = draws.randint(1, (most_bytes - 1) // 2)
    word = "".join(draws.choice(string.ascii_lowercase) for _ in range(length))
    return f"{word}|{word}"


def _fault(text: str) -> str | None:
    word, bar, copy = text.partition("|")
    if not bar:
        return "has no bar"
    if not set(word + copy) <= set(string.ascii_lowercase):
        return "has another character than a letter and one bar"
    if not word:
        return "has no word"
    if len(copy) != len(word):
        return "copies too few or too many letters"
    return None if copy == word else "copies other letters"


COPY = Language(_write, _fault)

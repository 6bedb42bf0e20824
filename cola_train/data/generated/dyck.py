"""Dyck words: brackets of two kinds, each closed by its own kind in the right order."""

import random

from cola_train.data.generated.language import Language

_CLOSES = {"(": ")", "[": "]"}


def _write(draws: random.Random, most_bytes: int) -> str:
    """A word of 1 to most_bytes // 2 pairs, each number as likely; uniform among its words."""
    left = 2 * draws.randint(1, most_bytes // 2)
    word, still_open = "", list[str]()
    while left:
        height = len(still_open)
        # The share of the ways from here down to 0 in `left` steps that begin with a step up, by
        # the ballot numbers (Arnold and Sleep, "Uniform random generation of balanced parenthesis
        # strings", 1980).
        if draws.randrange(2 * left * (height + 1)) < (height + 2) * (left - height):
            still_open.append(draws.choice("(["))
            word += still_open[-1]
        else:
            word += _CLOSES[still_open.pop()]
        left -= 1
    return word


def _fault(text: str) -> str | None:
    if not text:
        return "is empty"
    still_open: list[str] = []
    for character in text:
        if character in _CLOSES:
            still_open.append(character)
        elif character not in _CLOSES.values():
            return "has another character than a bracket"
        elif not still_open:
            return "closes what is not open"
        elif _CLOSES[still_open.pop()] != character:
            return "closes another kind than it opened"
    return "ends before all is closed" if still_open else None


DYCK = Language(_write, _fault)

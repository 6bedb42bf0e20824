"""How many words of a text a reader of the training text has met: a plain measure of whether a
small model spells.
"""

import re
from collections.abc import Iterable

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words(text: str, *, whole: bool = False) -> list[str]:
    """Words in lower case; unless `whole`, a word that the text's start or end may have cut is left
    out.
    """
    matches = list(_WORD.finditer(text))
    if not whole:
        matches = [match for match in matches if match.start() > 0 and match.end() < len(text)]
    return [match[0].lower() for match in matches]


def known_word_share(texts: Iterable[str], vocabulary: frozenset[str]) -> tuple[float, int]:
    """Share of the texts' words that are in `vocabulary`, and how many words there were; 0 of 0
    words is 0.
    """
    found = [word for text in texts for word in words(text)]
    return (sum(word in vocabulary for word in found) / len(found) if found else 0.0), len(found)

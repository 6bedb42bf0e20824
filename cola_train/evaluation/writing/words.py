"""Words of texts that are given as token ids: a measure of whether a small model spells."""

import itertools
import re
from collections.abc import Sequence

from cola_train.data.tokenizer import Tokenizer

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """Words in lower case, without those that the text's start or end may have cut."""
    return [
        match[0].lower()
        for match in _WORD.finditer(text)
        if match.start() > 0 and match.end() < len(text)
    ]


def first_word(ids: Sequence[int], tokenizer: Tokenizer, after: Sequence[int] = ()) -> str | None:
    """The word, in lower case, that a continuation of `after` begins with.

    None if it begins with anything but a space and a letter, or if the word may go on after the
    last token.
    """
    text = decode_ending(ids, tokenizer, after)
    found = words(text) if text[:1] == " " and text[1:2].isalpha() else []
    return found[0] if found else None


def decode_ending(ids: Sequence[int], tokenizer: Tokenizer, after: Sequence[int] = ()) -> str:
    """Decode, so that a word at the end is followed by something only if it is whole.

    The ids stand behind those of `after`. An end-of-text token becomes a line break. Without one,
    what may be the inside of a word is cut off: an apostrophe, or the first bytes of a letter.
    """
    text = tokenizer.decode(ids, after=after)
    return text + "\n" if ids[-1] == tokenizer.eos_token_id else text.rstrip("\ufffd'’")


def decode_row(row: Sequence[int], tokenizer: Tokenizer) -> str:
    """Decode, with a line break for each separator: without one it would join two words."""
    return "\n".join(documents_of(row, tokenizer))


def documents_of(ids: Sequence[int], tokenizer: Tokenizer, after: Sequence[int] = ()) -> list[str]:
    """The texts between separators, of ids that stand behind those of `after`."""
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    edges = itertools.pairwise([0, *ends, len(ids)])
    return [tokenizer.decode(ids[start:end], after=() if start else after) for start, end in edges]

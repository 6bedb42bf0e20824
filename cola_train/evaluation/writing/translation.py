"""The same text in the ids of another tokenizer."""

import dataclasses
from collections.abc import Sequence

from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.writing.words import documents_of


@dataclasses.dataclass(frozen=True)
class Translation:
    """A text in the ids of another tokenizer, documents apart as they were.

    `num_bytes` is its length in UTF-8, a separator being one byte.
    """

    ids: list[int]
    num_bytes: int

    @classmethod
    def of(
        cls, ids: Sequence[int], tokenizer: Tokenizer, other: Tokenizer, after: Sequence[int] = ()
    ) -> "Translation":
        """Of ids of `tokenizer` that stand behind those of `after`."""
        # A text may begin or end within a character.
        documents = [text.strip("\ufffd") for text in documents_of(ids, tokenizer, after)]
        found: list[int] = []
        for number, text in enumerate(documents):
            found += [other.eos_token_id] * (number > 0) + other.encode_document(text)
        return cls(found, len("\n".join(documents).encode()))

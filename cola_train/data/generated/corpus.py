"""Generated corpora: each document is a function of the corpus's kind, size, seed and its number.

So a corpus needs no file, and what a model writes can be judged without one.
"""

import hashlib
import random
from collections.abc import Iterator

from cola_train.config.data import GeneratedConfig
from cola_train.data.generated.arithmetic import ARITHMETIC
from cola_train.data.generated.copying import COPY
from cola_train.data.generated.dyck import DYCK
from cola_train.data.generated.language import Language
from cola_train.data.generated.records import RECORDS

LANGUAGES: dict[str, Language] = {
    "dyck": DYCK,
    "copy": COPY,
    "json": RECORDS,
    "arithmetic": ARITHMETIC,
}


def document(config: GeneratedConfig, index: int) -> str:
    """Document number `index` of a corpus; the same in any corpus that differs in its number."""
    assert config.kind is not None
    # A text as the seed is hashed by SHA-512, the same in all versions of Python.
    draws = random.Random(f"{config.kind}/{config.most_bytes}/{config.seed}/{index}")
    return LANGUAGES[config.kind].write(draws, config.most_bytes)


def documents(config: GeneratedConfig) -> Iterator[str]:
    """All documents of a corpus, in order; some may be alike."""
    return (document(config, index) for index in range(config.num_documents))


def corpus_sha256(config: GeneratedConfig) -> str:
    """The sha256 of a corpus's documents, a line each."""
    digest = hashlib.sha256()
    for text in documents(config):
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()

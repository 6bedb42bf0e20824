"""What a generated language brings: documents by number, and a judge of any text."""

import dataclasses
import random
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Language:
    """A set of short texts that a few lines of code decide.

    Attributes:
        write: a document of at most so many bytes, ASCII alone, by the draws of a generator.
        fault: why a text is not in the language, in words that are the same for all texts of that
            fault; None if it is in it.
    """

    write: Callable[[random.Random, int], str]
    fault: Callable[[str], str | None]

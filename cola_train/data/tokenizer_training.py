"""The training of a byte-level BPE, to a `tokenizer.json` file."""

import re
import threading
from collections.abc import Callable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cola_train.config.data import TokenizerTrainConfig
from cola_train.config.settings import require
from cola_train.console import progress_bar, say
from cola_train.data.records import BadRecords
from cola_train.data.sources import read_documents
from cola_train.data.tokenizer import DOLMA2_PATTERN, TRAINED_SPECIAL_TOKENS, Tokenizer

_PART_OF_WORD = r"[\s\S]{1,1000}"
_PIECE_CHARACTERS = 1 << 20


def train_tokenizer(config: TokenizerTrainConfig) -> Tokenizer:
    """Learn a byte-level BPE and write it to `config.out`. The same corpus gives the same bytes.

    A corpus with no more pairs to merge gives fewer than `config.vocab_size` ids. It is learnt in a
    thread, which Ctrl-C does not wait for.

    Raises:
        UserError: an empty corpus, a source that cannot be read, or an output that exists with
            other content.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(DOLMA2_PATTERN), behavior="removed", invert=True)
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The time to learn from a word grows with the square of its length.
    parts = pre_tokenizers.Split(tokenizers.Regex(_PART_OF_WORD), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, parts, spelled])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(TRAINED_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    num_documents, bad = 0, BadRecords(config.corpus.on_bad_record)

    def documents(given_up: threading.Event) -> Iterator[str]:
        nonlocal num_documents
        with progress_bar("reading", "documents") as bar:
            for text in filter(None, read_documents(config.corpus, bad)):
                num_documents += 1
                bar.update()
                yield from _pieces(text)
                if given_up.is_set():
                    return
        say(f"Learning {config.vocab_size:,} ids from {num_documents:,} documents ...")

    _interruptibly(lambda event: tokenizer.train_from_iterator(documents(event), trainer))
    bad.tell()
    require(
        num_documents > 0,
        "The corpus has no text to learn merges from: every document is "
        f"empty.{bad.summary} Check corpus.inputs.",
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, spelled])
    result = Tokenizer(tokenizer.to_str().encode("utf-8"), config.out)
    ids = f"{result.vocab_size} ids"
    if result.vocab_size != config.vocab_size:
        ids += f" ({config.vocab_size} asked; the corpus has no more pairs to merge)"
    result.save_and_say(config.out, f"{ids}, learnt from {num_documents} documents")
    return result


def _pieces(text: str) -> Iterator[str]:
    """A document in pieces that have its words, since the library holds hundreds at once."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS:
        piece = text[start : start + _PIECE_CHARACTERS]
        # No word of DOLMA2_PATTERN goes on at a blank after another character.
        cuts = [match.start() for match in re.finditer(r"(?<=\S) ", piece)]
        piece = piece[: cuts[-1]] if cuts else piece
        yield piece
        start += len(piece)
    yield text[start:]


def _interruptibly(work: Callable[[threading.Event], object]) -> None:
    """Do it in a thread: the library heeds no signal while it learns.

    The event is set when an exception, Ctrl-C, ends the wait for it.
    """
    given_up, raised = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(given_up)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        given_up.set()
        # A thread that wants Python while Python ends would abort the process.
        thread.join(1)
        raise
    if raised:
        raise raised[0]

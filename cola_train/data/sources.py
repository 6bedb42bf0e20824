"""Text sources in a fixed order: files, folders, globs, or a dataset of the `datasets` library."""

import contextlib
import dataclasses
import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cola_train.config.data import CorpusConfig
from cola_train.config.settings import UserError, nearest, require
from cola_train.console import progress_bar
from cola_train.data.readers import SUFFIXES, read_file, require_column, suffix_of, text_of
from cola_train.files import read_errors_explained


@dataclasses.dataclass(frozen=True)
class SourceHash:
    """One source and what identifies its content."""

    name: str
    kind: str  # how it is read: a suffix of `readers.SUFFIXES`, or "dataset"
    sha256: str


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """Files named by files, folders (recursively) and globs: each once, sorted by absolute path.

    Raises:
        UserError: an input that matches nothing, or a file of an unknown kind.
    """
    found: dict[Path, Path] = {}
    for text in inputs:
        path = Path(text).expanduser()
        # A path that exists is meant literally, be there a "[" in its name. Path.glob takes no
        # absolute patterns.
        named = [path] if path.exists() else glob.glob(str(path), recursive=True)  # noqa: PTH207
        if not named:
            raise UserError(_no_such_input(path))
        files: list[Path] = []
        for match in map(Path, named):
            files += _files_below(match) if match.is_dir() else [match]
        known = [file for file in files if suffix_of(file) is not None]
        require(
            bool(known),
            f"The corpus input {text} has no file of a known kind "
            f"({len(files)} of other kinds); allowed: {', '.join(SUFFIXES)}",
        )
        for file in known:
            found.setdefault(file.resolve(), file)
    return [found[key] for key in sorted(found)]


def read_documents(corpus: CorpusConfig) -> Iterator[str]:
    """The documents in order; those without text are empty strings, so that they can be counted.

    A UserError names the file and the place in it where a source is missing or malformed.
    """
    if corpus.dataset is not None:
        yield from _read_dataset(corpus)
    else:
        for path in expand_inputs(corpus.inputs):
            yield from read_file(path, corpus.text_column, corpus.documents)


def source_hashes(corpus: CorpusConfig) -> list[SourceHash]:
    """The sha256 of every file of the corpus in reading order, or a hosted dataset's fingerprint.

    A missing or unreadable source is a UserError.
    """
    if corpus.dataset is None:
        files = {path: (str(path), suffix_of(path) or "") for path in expand_inputs(corpus.inputs)}
    elif (folder := Path(corpus.dataset).expanduser()).is_dir():
        found = _files_below(folder)
        files = {path: (path.relative_to(folder).as_posix(), "dataset") for path in found}
    else:
        with _dataset_errors_explained(corpus):
            builder = _builder(corpus)
            # The builder's hash covers the repository's revision and the files the name means.
            identity = (corpus.dataset, corpus.dataset_config, corpus.dataset_split, builder.hash)
        sha256 = hashlib.sha256("\n".join(map(str, identity)).encode("utf-8")).hexdigest()
        return [SourceHash(corpus.dataset, "dataset", sha256)]
    hashes = []
    total = sum(path.stat().st_size for path in files)
    with progress_bar("hashing sources", "B", total=total, divisor=1024) as bar:
        for path, (name, kind) in files.items():
            with read_errors_explained(path), path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                hashes.append(SourceHash(name, kind, sha256))
                bar.update(file.tell())
    return hashes


def _files_below(folder: Path) -> list[Path]:
    def is_hidden(path: Path) -> bool:
        return any(part.startswith(".") for part in path.relative_to(folder).parts)

    return sorted(path for path in folder.rglob("*") if path.is_file() and not is_hidden(path))


def _no_such_input(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    look = f"look at what is in {path.parent}"
    hint = nearest(path.name, siblings) if 0 < len(siblings) <= 1000 else look
    return f"The corpus input {path} does not exist and matches no file; {hint}"


def _read_dataset(corpus: CorpusConfig) -> Iterator[str]:
    with _dataset_errors_explained(corpus):
        rows, column = _open_dataset(corpus), corpus.text_column
        place = f"The dataset {corpus.dataset}"
        if rows.column_names is not None:
            require_column(column, rows.column_names, place)
        for number, row in enumerate(rows):
            yield text_of(row, column, f"{place}, row {number}")


def _open_dataset(corpus: CorpusConfig) -> Any:
    import datasets

    assert corpus.dataset is not None
    folder, split = Path(corpus.dataset).expanduser(), corpus.dataset_split
    if not any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _builder(corpus).as_streaming_dataset(split=split)
    loaded = datasets.load_from_disk(str(folder))
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if split not in loaded:
        hint = nearest(split, loaded)
        raise UserError(
            f"The dataset {folder} has no split '{split}' (corpus.dataset_split); {hint}"
        )
    return loaded[split]


def _builder(corpus: CorpusConfig) -> Any:
    import datasets

    return datasets.load_dataset_builder(corpus.dataset, corpus.dataset_config)


@contextlib.contextmanager
def _dataset_errors_explained(corpus: CorpusConfig) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises many kinds, its readers' own among them
        first_line = str(error).strip().split("\n", 1)[0] or type(error).__name__
        raise UserError(
            f"The dataset {corpus.dataset} (split {corpus.dataset_split}) cannot be read: "
            f"{first_line} Check corpus.dataset, corpus.dataset_config and corpus.dataset_split."
        ) from error

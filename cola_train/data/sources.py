"""Text sources in a fixed order: files, folders, globs, a dataset of `datasets`, or made text."""

import contextlib
import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_train.config.content import open_file
from cola_train.config.data import CorpusConfig
from cola_train.config.settings import UserError, nearest, require
from cola_train.console import progress_bar, say
from cola_train.data.generated.corpus import corpus_sha256, documents
from cola_train.data.readers import SUFFIXES, read_file, suffix_of
from cola_train.data.records import BadRecords, outer_column, require_column, text_of
from cola_train.files import read_errors_explained

_OTHER = "of other endings"
_MOST_ENDINGS = 6


@dataclasses.dataclass(frozen=True)
class SourceHash:
    """One source and what identifies its content."""

    name: str
    kind: str  # how it is read: a suffix of `readers.SUFFIXES`, "dataset" or "generated"
    sha256: str


def expand_inputs(inputs: Sequence[str]) -> tuple[list[Path], dict[Path, str]]:
    """What files, folders (all that is below, linked folders too) and globs name.

    Returns:
        The files to read, each once, sorted by absolute path; and what else was met, why it is
        not read.

    Raises:
        UserError: an input that matches nothing, or nothing of a known kind.
    """
    found: dict[Path, Path] = {}
    left_out: dict[Path, str] = {}
    for text in inputs:
        path = Path(text).expanduser()
        # A path that exists is meant literally, be there a "[" in its name. Path.glob takes no
        # absolute patterns.
        named = [path] if path.exists() else glob.glob(str(path), recursive=True)  # noqa: PTH207
        if not named:
            raise UserError(_no_such_input(path))
        met: dict[Path, str | None] = {}
        for match in map(Path, named):
            met |= dict(sorted(_below(match))) if match.is_dir() else {match: _why_not(match)}
        if met.get(path) is not None:
            raise UserError(_cannot_read(path))
        others = {file: why or _OTHER for file, why in met.items() if why or not suffix_of(file)}
        require(
            len(others) < len(met),
            f"The corpus input {text} has no file of a known kind "
            f"({len(others)} of other kinds); allowed: {', '.join(SUFFIXES)}",
        )
        for file in met:
            if file not in others:
                found.setdefault(file.resolve(), file)
        left_out |= others
    return [found[key] for key in sorted(found)], left_out


def read_documents(corpus: CorpusConfig, bad: BadRecords | None = None) -> Iterator[str]:
    """The documents in order; those without text are empty strings, so that they can be counted.

    What a folder or glob holds that is not read is said in one line. A UserError names the file and
    the place in it where a source is missing or malformed; `bad` counts what
    corpus.on_bad_record lets pass.
    """
    bad = bad or BadRecords(corpus.on_bad_record)
    if corpus.generated.kind is not None:
        yield from documents(corpus.generated)
        return
    if corpus.dataset is not None:
        yield from _read_dataset(corpus, bad)
        return
    files, left_out = expand_inputs(corpus.inputs)
    _tell(left_out)
    for path in files:
        yield from read_file(path, corpus, bad)


def source_hashes(corpus: CorpusConfig) -> list[SourceHash]:
    """The sha256 of every file of the corpus in reading order, or a hosted dataset's fingerprint.

    Of generated text, of all its documents. A missing or unreadable source is a UserError.
    """
    if (made := corpus.generated.kind) is not None:
        return [SourceHash(made, "generated", corpus_sha256(corpus.generated))]
    if corpus.dataset is None:
        found, _ = expand_inputs(corpus.inputs)
        files = {path: (str(path), suffix_of(path) or "") for path in found}
    elif (folder := Path(corpus.dataset).expanduser()).is_dir():
        found = sorted(path for path, why_not in _below(folder) if why_not is None)
        files = {path: (path.relative_to(folder).as_posix(), "dataset") for path in found}
    else:
        with _dataset_errors_explained(corpus):
            builder = _builder(corpus)
            # The builder's hash covers the repository's revision and the files the name means.
            identity = (corpus.dataset, corpus.dataset_config, corpus.dataset_split, builder.hash)
        sha256 = hashlib.sha256("\n".join(map(str, identity)).encode("utf-8")).hexdigest()
        return [SourceHash(corpus.dataset, "dataset", sha256)]
    hashes = []
    total = 0
    for path in files:
        with read_errors_explained(path):
            total += path.stat().st_size
    with progress_bar("hashing sources", "B", total=total, divisor=1024) as bar:
        for path, (name, kind) in files.items():
            with read_errors_explained(path), open_file(path) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                hashes.append(SourceHash(name, kind, sha256))
                bar.update(file.tell())
    return hashes


def _below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files below a folder and why each is not to be read; None for one that is.

    Linked folders are entered, but no folder twice: a link may lead in a circle.
    """
    entered = set()
    with read_errors_explained(folder):
        for name, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            here = Path(name)
            status = here.stat()  # of what a link names
            if (status.st_dev, status.st_ino) in entered:
                folders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            hidden = [name for name in (*folders, *files) if name.startswith(".")]
            yield from ((here / name, "hidden") for name in sorted(hidden))
            folders[:] = sorted(set(folders) - set(hidden))
            for path in (here / name for name in sorted(set(files) - set(hidden))):
                yield path, _why_not(path)


def _cannot_read(path: Path) -> str:
    is_gone = path.is_symlink() and not path.exists()
    reason = "No such file" if is_gone else "it is a pipe or a device, which may have no end"
    return (
        f"Cannot read {path}: {reason}. Give files that can be read again, in corpus.inputs; save "
        "what comes through a pipe to one first."
    )


def _why_not(path: Path) -> str | None:
    """Why what is no folder cannot be read: a pipe may never end, a device has no end."""
    if path.is_file():
        return None
    return "broken links" if path.is_symlink() else "no regular files"


def _raise(error: OSError) -> None:
    raise error


def _tell(left_out: Mapping[Path, str]) -> None:
    reasons: dict[str, list[Path]] = {}
    for path, why in left_out.items():
        reasons.setdefault(why, []).append(path)
    parts = []
    for why, paths in reasons.items():
        endings = sorted({"".join(path.suffixes[-2:]) or "none" for path in paths})
        named = f" ({', '.join(endings[:_MOST_ENDINGS])})" if why == _OTHER else ""
        parts.append(f"{len(paths):,} {why}{named}, the first {paths[0]}")
    if parts:
        say(f"Not read from corpus.inputs: {'; '.join(parts)}.")


def _no_such_input(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    look = f"look at what is in {path.parent}"
    hint = nearest(path.name, siblings) if 0 < len(siblings) <= 1000 else look
    literal = str(path).replace("[", "[[]")
    if "[" in str(path) and glob.glob(literal, recursive=True):  # noqa: PTH207
        hint = f"[ ] are glob characters here; write [[] for [, as in {literal}"
    elif with_comma := sorted(name for name in siblings if name.startswith(f"{path.name},")):
        hint = f"put quotes around a name with a comma: 'corpus.inputs=[\"{with_comma[0]}\"]'"
    return f"The corpus input {path} does not exist and matches no file; {hint}"


def _read_dataset(corpus: CorpusConfig, bad: BadRecords) -> Iterator[str]:
    with _dataset_errors_explained(corpus):
        rows, column = _open_dataset(corpus), corpus.text_column
        place = f"The dataset {corpus.dataset}"
        if rows.column_names is not None:
            require_column(outer_column(column, rows.column_names), rows.column_names, place)
        for number, row in enumerate(rows):
            most_bytes = corpus.max_document_bytes
            text = text_of(row, column, f"{place}, row {number}", bad, most_bytes)
            if text is not None:
                yield text


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

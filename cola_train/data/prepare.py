"""`cola-train prepare`: a corpus and a tokenizer to a prepared folder, complete or not at all."""

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from cola_train.config.data import PrepareConfig
from cola_train.config.settings import UserError, require
from cola_train.console import progress_bar, say
from cola_train.data.packing import (
    TRAIN,
    VALIDATION,
    EncodedDocuments,
    Encoder,
    SplitCounts,
    SplitWriter,
    checks_file,
    documents_file,
    token_dtype,
    tokens_file,
)
from cola_train.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    PreparedData,
    PreparedManifest,
)
from cola_train.data.records import BadRecords
from cola_train.data.sources import SourceHash, read_documents, source_hashes
from cola_train.data.special_tokens import NAMES_FILE, SpecialTokens
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import atomic_folder, sweep

_BATCH_CHARACTERS = 1 << 18
_BATCH_DOCUMENTS = 4096
_SAMPLE_CHARACTERS = 4000


def prepare(config: PrepareConfig) -> PreparedData:
    """Write the prepared folder `config.out`; if it holds just that already, only say so.

    The bytes written depend on the corpus, the tokenizer and the settings, not on `num_processes`.

    Raises:
        UserError: a source or the tokenizer cannot be read, the corpus fills no row of a split,
            `config.out` holds something else, or it cannot be written. Nothing is left behind.
    """
    out = Path(config.out)
    names = SpecialTokens(config.eos_token, config.pad_token)
    tokenizer = Tokenizer.load(config.tokenizer, names)
    recipe = _recipe(config, tokenizer)
    sweep(out.parent, out.name)
    if out.exists():
        return _already_there(out, config, recipe)
    sources = source_hashes(config.corpus)
    started = time.monotonic()
    with atomic_folder(out) as folder:
        bad = BadRecords(config.corpus.on_bad_record)
        splits, num_empty = _write_splits(folder, config, tokenizer, bad)
        tokenizer.save(folder / TOKENIZER_FILE)
        kinds = (tokens_file, documents_file, checks_file)
        files = [name(split) for split in splits for name in kinds]
        files += [name for name in (TOKENIZER_FILE, NAMES_FILE) if (folder / name).exists()]
        manifest = PreparedManifest(
            format_version=FORMAT_VERSION,
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            token_dtype=token_dtype(tokenizer.vocab_size),
            num_empty_documents=num_empty,
            splits=splits,
            sources=tuple(sources),
            files={name: (folder / name).stat().st_size for name in files},
            num_skipped_records=bad.num_skipped,
            num_replaced_records=bad.num_replaced,
            bad_records=tuple(bad.places),
            **recipe,
        )
        (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    prepared = PreparedData.open(out)
    seconds = time.monotonic() - started
    bad.tell()
    num_tokens = sum(counts.num_tokens + counts.num_dropped_tokens for counts in splits.values())
    say(
        f"Prepared {prepared.summary}; {num_empty} empty documents skipped; "
        f"{num_tokens:,} tokens in {seconds:.1f} s ({num_tokens / seconds:,.0f} tokens/s)."
    )
    return prepared


def _recipe(config: PrepareConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    # With the content of the sources, all that the bytes depend on; names as in PreparedManifest.
    stops, made = config.corpus.on_bad_record == "stop", config.corpus.generated
    return {
        "seq_len": config.seq_len,
        "document_alignment": config.document_alignment,
        "held_out_share": config.held_out_share,
        "text_column": config.corpus.text_column,
        "documents": config.corpus.documents,
        "dataset_config": config.corpus.dataset_config,
        "dataset_split": config.corpus.dataset_split,
        "tokenizer_sha256": tokenizer.sha256,
        "on_bad_record": config.corpus.on_bad_record,
        "max_document_bytes": None if stops else config.corpus.max_document_bytes,
        "generated": None if made.kind is None else dataclasses.asdict(made),
    }


def _already_there(out: Path, config: PrepareConfig, recipe: dict[str, Any]) -> PreparedData:
    require(
        (out / MANIFEST_FILE).is_file(),
        f"{out} already exists and is not prepared data; it is never overwritten. Give another "
        "out=.",
    )
    existing = PreparedData.open(out)
    differences = [
        f"{name} is {getattr(existing.manifest, name)} there, {value} here"
        for name, value in recipe.items()
        if getattr(existing.manifest, name) != value
    ]
    if not differences:
        here, there = _contents(source_hashes(config.corpus)), _contents(existing.manifest.sources)
        if here != there:
            differences.append(
                f"the sources differ: {len(there)} files there, {len(here)} here, "
                f"{len(set(here) & set(there))} in common"
            )
    require(
        not differences,
        f"{out} already exists with something else in it, and is never overwritten "
        f"({'; '.join(differences)}); give another out=, or delete it first.",
    )
    say(f"Already prepared, nothing to do: {existing.summary}.")
    return existing


def _contents(sources: Iterable[SourceHash]) -> list[tuple[str, str]]:
    # Without the names: the same files in another place give the same data.
    return [(source.kind, source.sha256) for source in sources]


def _write_splits(
    folder: Path, config: PrepareConfig, tokenizer: Tokenizer, bad: BadRecords
) -> tuple[dict[str, SplitCounts], int]:
    splits = [TRAIN, VALIDATION] if config.held_out_share > 0 else [TRAIN]
    encoder = Encoder(tokenizer, config.held_out_share, config.document_alignment)
    num_empty = num_documents = 0

    def documents() -> Iterator[str]:
        nonlocal num_empty
        for text in read_documents(config.corpus, bad):
            if text:
                yield text
            else:
                num_empty += 1

    with contextlib.ExitStack() as stack:
        writers = {}
        for split in splits:
            writer = SplitWriter(folder, split, config.seq_len, tokenizer.vocab_size)
            writers[split] = stack.enter_context(contextlib.closing(writer))
        bar = stack.enter_context(progress_bar("preparing", "tok"))
        texts = _checked(_batches(documents()), tokenizer)
        batches = _encode(texts, encoder, config.num_processes)
        encoded = stack.enter_context(contextlib.closing(batches))
        started = time.monotonic()
        for batch in encoded:
            for split, writer in writers.items():
                writer.append(batch[split])
                bar.update(len(batch[split].tokens))
                num_documents += len(batch[split].lengths)
            rate = num_documents / (time.monotonic() - started)
            pace = f"{num_documents:,} documents, {rate:,.0f} documents/s"
            bar.set_postfix_str(pace, refresh=False)
        require(
            num_documents > 0,
            f"The corpus has no text: {num_empty} documents, all empty.{bad.summary} "
            "Check corpus.inputs (or corpus.dataset) and corpus.text_column.",
        )
        counts = {split: writer.finish() for split, writer in writers.items()}
    _require_rows(counts, config)
    return counts, num_empty


def _require_rows(counts: dict[str, SplitCounts], config: PrepareConfig) -> None:
    require(
        counts[TRAIN].num_rows > 0,
        "The corpus must fill at least one row of the training split: it has "
        f"{counts[TRAIN].num_dropped_tokens} tokens, seq_len is {config.seq_len}. Give more text "
        "or a smaller seq_len.",
    )
    if VALIDATION in counts:
        require(
            counts[VALIDATION].num_rows > 0,
            "The held-out documents must fill at least one row: "
            f"held_out_share={config.held_out_share} chose "
            f"{counts[VALIDATION].num_dropped_tokens} tokens, seq_len is {config.seq_len}. Raise "
            "held_out_share, use a shorter seq_len, or set held_out_share=0 for no validation "
            "split.",
        )


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in documents:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _checked(batches: Iterator[list[str]], tokenizer: Tokenizer) -> Iterator[list[str]]:
    """The batches, while the tokenizer gives back what stands at the beginning of each."""
    num_lost = num_characters = 0
    for batch in batches:
        room = _SAMPLE_CHARACTERS
        for text in batch:
            lost, characters = tokenizer.lost_characters(text[:room])
            num_lost, num_characters = num_lost + lost, num_characters + characters
            room -= len(text)
            if room <= 0:
                break
        found = f"{num_lost:,} of {num_characters:,} characters looked at"
        require(
            2 * num_lost <= num_characters,
            f"The tokenizer loses the text: {found} become unknown tokens, or nothing. Use one of "
            "this language and script, for example of `cola-train tokenizer train`.",
        )
        yield batch
    if num_lost:
        say(f"The tokenizer loses {found}: they become unknown tokens, or nothing.")


def _encode(
    batches: Iterator[list[str]], encoder: Encoder, num_processes: int
) -> Generator[dict[str, EncodedDocuments], None, None]:
    """Encode batches in order, a bounded number of them in memory."""
    if num_processes == 1:
        yield from map(encoder, batches)
        return
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(num_processes, spawn, _start_worker, (encoder,))
    pending: collections.deque[Future[dict[str, EncodedDocuments]]] = collections.deque()
    try:
        for batch in batches:
            pending.append(executor.submit(_encode_in_worker, batch))
            if len(pending) > 3 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "A tokenizing process died, perhaps for lack of memory: use a smaller num_processes. "
            "(A script that calls `prepare` needs the guard `if __name__ == '__main__':`.)"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches every process of the terminal; only the parent answers it and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed tells nobody; its workers would wait for work forever.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> dict[str, EncodedDocuments]:
    assert _worker_encoder is not None
    return _worker_encoder(texts)

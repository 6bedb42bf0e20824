"""`cola-train bench data`: the cost of text to rows, rows to batches, and opening a huge store."""

import contextlib
import dataclasses
import io
import itertools
import os
import random
import shutil
import statistics
import tempfile
import time
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from cola_train.bench.config import NOVELS, BenchDataConfig, BenchTrainConfig
from cola_train.bench.machine import Clock, Speedometer, spread
from cola_train.bench.worker import measure_in_a_process
from cola_train.config.data import CorpusConfig, PrepareConfig, TokenizerTrainConfig
from cola_train.config.settings import UserError, require
from cola_train.console import progress_bar
from cola_train.data.batch import Batch, PackedRows
from cola_train.data.packing import TRAIN, SplitCounts, documents_file, tokens_file
from cola_train.data.prepare import prepare
from cola_train.data.prepared import MANIFEST_FILE, PreparedData
from cola_train.data.sources import read_documents
from cola_train.data.tokenizer import Tokenizer
from cola_train.data.tokenizer_training import train_tokenizer
from cola_train.training.data import batch_loader, dealt

_LEARNT_IDS = 4096
# Texts in one call of the library; with more, it is slower on one core.
_LIBRARY_BATCHES = (64, 1024)
_BATCHES_A_RUN = 200
HUGE_ROWS, HUGE_STEP, _HUGE_SEQ_LEN = 10**9, 10**6, 512
_CLOCK = Clock(torch.device("cpu"), threads=1)


def run_data(config: BenchDataConfig) -> dict[str, Any]:
    """Measure in this process, on one core, in a temporary folder.

    Returns:
        What can be written as JSON:
        `tokenizing`: tokens per second of CPU time, separators not counted, of the whole of
        `cola-train prepare`, and of the tokenizer library's `encode_batch_fast` alone on the same
        documents, by the texts in a call; ours over the best of these. Both load the tokenizer's
        file.
        `reading`: microseconds of CPU time a row takes through the training loop's loader,
        collation included, and a batch's share of a training step; for the prepared text, and for
        a store of 10^9 rows of 512 tokens whose files are sparse.
        `huge_store`: wall-clock seconds to open that store, and to open it and have the batch of
        step 10^6.

    Raises:
        UserError: a text or tokenizer that cannot be read, a text that fills no row, or a disk
            without room for sparse files.
    """
    require(
        config.text is None or Path(config.text).is_file(),
        f"There is no text file {config.text}; give a .txt file, or null.",
    )
    if config.tokenizer is not None:
        Tokenizer.load(config.tokenizer)
    source = CorpusConfig(inputs=[config.text or str(NOVELS)])
    step_seconds = config.step_seconds or _step_seconds(config)
    speedometer = Speedometer(_CLOCK)
    with (
        tempfile.TemporaryDirectory(prefix="cola-train-bench-") as name,
        # The tokenizer library would spread a batch over all cores.
        unittest.mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"),
    ):
        folder = Path(name)
        speedometer.read()
        corpus = _repeated(config, source, folder / "text.txt")
        tokenizer = Path(config.tokenizer or folder / "tokenizer.json")
        if config.tokenizer is None:
            train_tokenizer(TokenizerTrainConfig(str(tokenizer), source, vocab_size=_LEARNT_IDS))
        tokenizing = _tokenizing(config, corpus, tokenizer, folder / "rows")
        prepared = PreparedData.open(folder / "rows")
        huge = _sparse_store(prepared, folder / "huge")
        reading = {
            "prepared_text": _reading(config, prepared, 0, step_seconds),
            "huge_store": _reading(config, huge, HUGE_STEP, step_seconds),
        }
        opening = _opening(config, huge.folder)
        speedometer.read()
    return {
        "text": config.text or NOVELS.name,
        "tokenizer": config.tokenizer or f"{_LEARNT_IDS} ids learnt from the text",
        "seq_len": config.seq_len,
        "rows": config.rows,
        "step_seconds": step_seconds,
        "machine": speedometer.report(),
        "tokenizing": tokenizing,
        "reading": reading,
        "huge_store": {"rows": HUGE_ROWS, "seq_len": _HUGE_SEQ_LEN, "step": HUGE_STEP, **opening},
    }


def _step_seconds(config: BenchDataConfig) -> float:
    train = BenchTrainConfig(
        workload="S", rows=config.rows, seq_len=config.seq_len, runs=config.runs
    )
    found = measure_in_a_process("train", train, ["trainer.accelerator=cpu"])
    return float(found["seconds"]["median"])


def _repeated(config: BenchDataConfig, source: CorpusConfig, path: Path) -> CorpusConfig:
    """The source's text, repeated until it is long enough, as the file `path`."""
    paragraphs = [text for text in read_documents(source) if text]
    require(bool(paragraphs), f"{config.text} has no text in it; give a .txt file of prose.")
    repeated, shuffled = list(paragraphs), random.Random(0)
    for _ in range(1, -(-config.least_characters // sum(map(len, paragraphs)))):
        shuffled.shuffle(paragraphs)
        repeated += paragraphs
    path.write_text("\n\n".join(repeated), encoding="utf-8")
    return CorpusConfig(inputs=[str(path)])


def _tokenizing(
    config: BenchDataConfig, corpus: CorpusConfig, tokenizer: Path, out: Path
) -> dict[str, Any]:
    """Measure the library and `prepare` in turns, so that both meet the same machine."""
    documents = [text for text in read_documents(corpus) if text]
    settings = PrepareConfig(
        str(out), str(tokenizer), seq_len=config.seq_len, corpus=corpus, held_out_share=0.0
    )
    ours: list[float] = []
    library: dict[int, list[float]] = {size: [] for size in _LIBRARY_BATCHES}
    num_tokens = 0
    with progress_bar("tokenizing", "run", config.runs + 1) as bar:
        for _ in range(config.runs + 1):
            for size, rates in library.items():
                num_tokens, seconds = _library(tokenizer, documents, size)
                rates.append(num_tokens / seconds)
            shutil.rmtree(out, ignore_errors=True)
            with contextlib.redirect_stderr(io.StringIO()):  # one bar is enough
                ours.append(num_tokens / _CLOCK.time(lambda: prepare(settings)))
            bar.update(1)
    found = {str(size): spread(rates[1:]) for size, rates in library.items()}
    best = max(rates["median"] for rates in found.values())
    return {
        "documents": len(documents),
        "tokens": num_tokens,
        "ours_tokens_per_second": spread(ours[1:]),
        "library_tokens_per_second": found,
        "ratio": statistics.median(ours[1:]) / best,
    }


def _library(tokenizer: Path, documents: Sequence[str], size: int) -> tuple[int, float]:
    """Tokens, and CPU seconds of the library alone with `size` texts a call, loading included."""
    num_tokens, begin = 0, _CLOCK.read()
    encode_batch = Tokenizer.load(tokenizer).library_for_documents.encode_batch_fast
    for first in range(0, len(documents), size):
        encoded = encode_batch(documents[first : first + size], add_special_tokens=False)
        num_tokens += sum(map(len, encoded))
    return num_tokens, _CLOCK.read() - begin


def _sparse_store(like: PreparedData, folder: Path) -> PreparedData:
    """A store of 10^9 rows of id 0, one document, whose files take no room on the disk."""
    folder.mkdir()
    num_tokens = HUGE_ROWS * _HUGE_SEQ_LEN
    sizes = {tokens_file(TRAIN): num_tokens * 4, documents_file(TRAIN): HUGE_ROWS * 8}  # u4, u8
    for name, size in sizes.items():
        (folder / name).touch()
        try:
            os.truncate(folder / name, size)
        except OSError as error:
            raise UserError(
                f"Cannot make a sparse file of {size:,} bytes in {folder.parent} "
                f"({error.strerror}); set TMPDIR to a folder of another file system."
            ) from error
    splits = {TRAIN: SplitCounts(HUGE_ROWS, HUGE_ROWS, num_tokens, 0)}
    manifest = dataclasses.replace(
        like.manifest,
        format_version=1,  # whose rows have no checksums, which 8 GB of zeros would not be
        seq_len=_HUGE_SEQ_LEN,
        token_dtype="<u4",
        splits=splits,
        files=sizes,
    )
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    return PreparedData.open(folder)


def _batches(config: BenchDataConfig, prepared: PreparedData, step: int) -> Iterator[Batch]:
    """As the training loop reads them, from optimizer step `step` on."""
    steps = dealt(itertools.count(step), config.rows, rank=0, world_size=1)
    return iter(batch_loader(PackedRows(prepared, data_seed=0), steps, num_workers=0))


def _reading(
    config: BenchDataConfig, prepared: PreparedData, step: int, step_seconds: float
) -> dict[str, Any]:
    batches = _batches(config, prepared, step)

    def read() -> None:
        for _ in range(_BATCHES_A_RUN):
            next(batches)

    read()
    seconds = [_CLOCK.time(read) for _ in range(config.runs)]
    per_row = spread([second / _BATCHES_A_RUN / config.rows * 1e6 for second in seconds])
    return {
        "microseconds_per_row": per_row,
        "share_of_step": per_row["median"] * config.rows / 1e6 / step_seconds,
    }


def _opening(config: BenchDataConfig, folder: Path) -> dict[str, Any]:
    opened, resumed = [], []
    for _ in range(config.runs):
        begin = time.perf_counter()
        store = PreparedData.open(folder)
        opened.append(time.perf_counter() - begin)
        batch = next(_batches(config, store, HUGE_STEP))
        resumed.append(time.perf_counter() - begin)
        assert batch.sample_index[0] == HUGE_STEP * config.rows
    return {"open_seconds": spread(opened), "first_batch_seconds": spread(resumed)}

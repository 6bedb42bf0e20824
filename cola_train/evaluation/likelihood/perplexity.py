"""The `likelihood` verb, on held-out rows or texts."""

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import UserError, require
from cola_train.data.batch import VALIDATION_SAMPLE_OFFSET
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.devices import named_device
from cola_train.evaluation.likelihood.likelihood import RowLikelihood, log_likelihoods_stream
from cola_train.evaluation.likelihood.rates import Rate, perplexity_of, table
from cola_train.evaluation.likelihood.tables import table_rates
from cola_train.evaluation.resuming import ResultFile, digest
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.registry import load_checkpoint
from cola_train.json_lines import read_jsonl
from cola_train.likelihood.rows import ScoredRow

_FOUND = tuple(field.name for field in dataclasses.fields(RowLikelihood))


def held_out_rows(
    data: PreparedData, num_rows: int | None, mask_documents: bool
) -> list[ScoredRow]:
    """The first `num_rows` (None: all) held-out rows, with the draws of training's validation."""
    count = data.num_rows(VALIDATION)
    require(
        count > 0,
        f"{data.folder} has no held-out rows; prepare it with held_out_share above 0, or give "
        "--texts.",
    )
    rows = []
    for number in range(count if num_rows is None else min(num_rows, count)):
        tokens, documents = data.row(VALIDATION, number)
        own_documents = documents.tolist() if mask_documents else None
        rows.append(ScoredRow(tokens.tolist(), VALIDATION_SAMPLE_OFFSET + number, own_documents))
    return rows


def read_texts(path: Path, tokenizer: Tokenizer) -> tuple[list[ScoredRow], list[dict[str, Any]]]:
    """The rows and the objects of a JSON-lines file.

    A line is {"text": ...} or {"prompt": ..., "continuation": ...}. Special tokens written in a
    text are recognized; none are added. Row n's draws have the address n, from 0.

    Raises:
        UserError: no such file, not UTF-8, a bad line (its number is given), nothing to score in
            one, or no line at all.
    """
    rows: list[ScoredRow] = []
    records = []
    for where, record in read_jsonl(path, "texts"):
        fields = record if isinstance(record, dict) else {}
        prompt, text = fields.get("prompt", ""), fields.get("text", fields.get("continuation"))
        is_one = ("text" in fields) != ({"prompt", "continuation"} <= fields.keys())
        if not (is_one and isinstance(prompt, str) and isinstance(text, str)):
            raise UserError(
                f'{where} must be {{"text": "..."}} or {{"prompt": "...", "continuation": "..."}}.'
            )
        given, ids = tokenizer.encode(prompt), tokenizer.encode(text)
        require(
            bool(ids),
            f"{where} has no token to score: its {'text' if 'text' in record else 'continuation'} "
            "is empty.",
        )
        rows.append(ScoredRow([*given, *ids], key=len(rows), given=len(given)))
        records.append(record)
    return rows, records


def measure(
    checkpoint_folder: Path,
    data_folder: Path | None,
    texts: Path | None,
    out: Path | None,
    device: str,
    config: LikelihoodConfig,
) -> str:
    """Compute the likelihood of `data_folder`'s held-out rows or of `texts`; returns the table.

    Beside that of rows stand tables of n-grams of the data's training rows.
    The checkpoint may be of any family. `out` gets a JSON line a row, as soon as it is known; the
    same call goes on with one that it did not finish. Documents of a row are kept apart where
    training kept them apart.

    Raises:
        UserError: no such checkpoint, data of another tokenizer, no held-out rows, bad texts, `out`
            holds something else, or as of `log_likelihoods_stream`; and, after all rows, those
            whose likelihood is not finite.
    """
    results = None if out is None else ResultFile(out, _FOUND)
    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    tokenizer, beside = checkpoint.tokenizer, dict[str, Rate]()
    if texts is not None:
        rows, records = read_texts(texts, tokenizer)
    else:
        assert data_folder is not None
        data = PreparedData.open(data_folder)
        require(
            data.manifest.tokenizer_sha256 == tokenizer.sha256,
            f"The data in {data_folder} has another tokenizer than {checkpoint_folder}; give data "
            "that was prepared with the checkpoint's own.",
        )
        rows = held_out_rows(data, config.num_rows, checkpoint.masks_documents)
        records = [{"row": number} for number in range(len(rows))]
        masks = checkpoint.masks_documents
        beside = table_rates(data, len(rows), checkpoint.vocab_size, masks)
    warn_if_long(rows, checkpoint.trained_seq_len)
    done = set() if results is None else results.begin(_identity(checkpoint, config, rows), records)
    found: dict[int, RowLikelihood] = {}
    bad: dict[int, float] = {}
    stream = log_likelihoods_stream(checkpoint, rows, config, done)
    left = len(rows) - len(done)
    for number, likelihood in tqdm(stream, "likelihood", left, unit="row", disable=None):
        if not math.isfinite(likelihood.log_p):
            bad[number] = likelihood.log_p
            continue
        found[number] = likelihood
        if results is not None:
            results.append(records[number], dataclasses.asdict(likelihood))
    if bad:
        number, log_p = next(iter(bad.items()))
        others = f", like that of {len(bad) - 1} other rows" if len(bad) > 1 else ""
        raise UserError(
            f"log p of row {number} is not finite ({log_p}){others}: the checkpoint may have "
            "diverged; look at it with `cola-train inspect`, or take more steps or another solver."
        )
    if results is None:
        ordered = [found[number] for number in range(len(rows))]
    else:
        ordered = [_likelihood(row, results.path) for row in results.finish()]
    sizes = [tokenizer.num_bytes(r.tokens[r.given :], after=r.tokens[: r.given]) for r in rows]
    num_bytes = None if None in sizes else sum(size or 0 for size in sizes)
    conditional = any(row.given for row in rows)
    page = table(perplexity_of(checkpoint, ordered, config, num_bytes, conditional), beside)
    page += "  " + _about_tables(beside, texts) + "\n"
    title = f"{checkpoint_folder}, {texts or data_folder}"
    return f"{title}\n{checkpoint.describe_likelihood(config)}\n\n{page}"


def _about_tables(beside: Mapping[str, Rate], texts: Path | None) -> str:
    if beside:
        return "unigrams, bigrams: by tables of the training rows alone, the same tokens"
    if texts is not None:
        return "no n-gram tables beside it: with --texts no training rows are known, as with --data"
    return "no n-gram tables beside it: this data has no training rows"


def _identity(
    checkpoint: Checkpoint, config: LikelihoodConfig, rows: Sequence[ScoredRow]
) -> dict[str, Any]:
    """All that decides the results. The batch size does not, so that it may be lowered."""
    settings = dataclasses.asdict(config)
    del settings["batch_size"], settings["num_rows"]
    each = ([list(row.tokens), row.key, row.documents, row.given] for row in rows)
    own = {"count": len(rows), "sha256": digest(each)}
    return {**checkpoint.identity(), "likelihood": settings, "rows": own}


def _likelihood(row: Mapping[str, Any], path: Path) -> RowLikelihood:
    """The result in a line of `path`."""
    values = {name: row[name] for name in _FOUND}
    numbers = [value for value in values.values() if value is not None]
    require(
        all(type(value) in (int, float) for value in numbers)
        and None not in (values["num_tokens"], values["log_p"]),
        f"{path} was changed: {values} is no result. Take that line out and give the same command "
        "again: its row is then measured anew.",
    )
    return RowLikelihood(**values)


def warn_if_long(rows: Sequence[ScoredRow], limit: int | None) -> None:
    """Warn once of rows that are longer than training's, which `limit` is; None is not known."""
    long = [len(row.tokens) for row in rows if limit and len(row.tokens) > limit]
    if long:
        warnings.warn(
            f"{len(long)} of {len(rows)} texts, the longest of {max(long)} tokens, are longer than "
            f"the rows of {limit} tokens that this model was trained on; it has seen "
            "nothing longer, and their likelihood may be poor for that alone.",
            stacklevel=3,
        )

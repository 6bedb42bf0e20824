"""Perplexity over many rows, and the `likelihood` verb: held-out rows or texts in, a table and JSON
lines out.
"""

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.settings import UserError, require
from cola_train.data.batch import VALIDATION_SAMPLE_OFFSET
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.devices import named_device
from cola_train.evaluation.likelihood.likelihood import RowLikelihood, log_likelihoods_stream
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.registry import load_checkpoint
from cola_train.files import read_jsonl, write_atomically
from cola_train.likelihood.rows import ScoredRow


@dataclasses.dataclass(frozen=True)
class Rate:
    """-log p per token, a ratio of sums over rows.

    Attributes:
        nats_per_token: what it is.
        standard_error: over rows, so that it covers which rows there are and what was drawn; None
            of one row.
    """

    nats_per_token: float
    standard_error: float | None

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite where that overflows."""
        return math.inf if self.nats_per_token >= 700 else math.exp(self.nats_per_token)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What rows come to.

    Attributes:
        exact: AR's; the others' figures are upper bounds of what an exact one would be.
        nats: by the ELBO, or LLaDA's bound, or exact.
        iwae: by IWAE's bound; None of the baselines.
        iwae_holds: False where it is no bound, since log p(z_0) was Hutchinson's estimate (`iwae`,
            importance.py).
        parts: Cola's ELBO per token: -log p(x | z_0), -log p(z_0) and -log q(z_0 | x); the third is
            subtracted.
        bits_per_byte: of `nats`, over the UTF-8 bytes of the scored text; an end-of-text token has
            none.
    """

    num_rows: int
    num_tokens: int
    exact: bool
    nats: Rate
    iwae: Rate | None
    iwae_holds: bool
    parts: dict[str, float]
    bits_per_byte: float | None

    def figures(self) -> dict[str, float]:
        """By names that say the unit, for a log; IWAE's only where it holds."""
        name = "exact" if self.exact else "elbo"
        found = {
            f"{name}_nats_per_token": self.nats.nats_per_token,
            f"{name}_perplexity": self.nats.perplexity,
        }
        if self.iwae is not None and self.iwae_holds:
            found |= {
                "iwae_nats_per_token": self.iwae.nats_per_token,
                "iwae_perplexity": self.iwae.perplexity,
            }
        found |= {f"{part}_nats_per_token": value for part, value in self.parts.items()}
        if self.nats.standard_error is not None:
            found[f"{name}_standard_error"] = self.nats.standard_error
        return found


def perplexity_of(
    checkpoint: Checkpoint,
    found: Sequence[RowLikelihood],
    config: LikelihoodConfig,
    num_bytes: int | None = None,
) -> Perplexity:
    """Sum up rows' likelihoods, found with `config`; `num_bytes` is the UTF-8 length of the text
    they are of.
    """
    tokens = np.array([row.num_tokens for row in found])
    nats = np.array([-row.log_p for row in found])
    bounds = [row.iwae for row in found if row.iwae is not None]
    parts = {}
    for part in ("reconstruction", "prior", "entropy"):
        values = [getattr(row, part) for row in found]
        if None not in values:
            sign = 1 if part == "entropy" else -1
            parts[part] = sign * sum(values) / float(tokens.sum())
    return Perplexity(
        num_rows=len(found),
        num_tokens=int(tokens.sum()),
        exact=checkpoint.likelihood_kind == "exact",
        nats=_rate(nats, tokens),
        iwae=_rate(-np.array(bounds), tokens) if bounds else None,
        iwae_holds=config.divergence == "exact",
        parts=parts,
        bits_per_byte=float(nats.sum() / math.log(2) / num_bytes) if num_bytes else None,
    )


def _rate(nats: np.ndarray, tokens: np.ndarray) -> Rate:
    """Sum over sum, and the error of that ratio by the delta method."""
    rate = float(nats.sum() / tokens.sum())
    if len(nats) == 1:
        return Rate(rate, None)
    residuals = nats - rate * tokens
    return Rate(
        rate, float(np.sqrt((residuals**2).sum() / (len(nats) * (len(nats) - 1))) / tokens.mean())
    )


def held_out_rows(
    data: PreparedData, num_rows: int | None, mask_documents: bool
) -> list[ScoredRow]:
    """The first held-out rows, as training's validation sees them and with its addresses of draws;
    null takes all.
    """
    count = data.num_rows(VALIDATION)
    require(
        count > 0,
        f"{data.folder} has no held-out rows; prepare it with held_out_share above 0, or give "
        "--texts.",
    )
    rows = []
    for number in range(count if num_rows is None else min(num_rows, count)):
        tokens, documents = data.row(VALIDATION, number)
        rows.append(
            ScoredRow(
                tokens.tolist(),
                VALIDATION_SAMPLE_OFFSET + number,
                documents.tolist() if mask_documents else None,
            )
        )
    return rows


def read_texts(path: Path, tokenizer: Tokenizer) -> tuple[list[ScoredRow], list[dict[str, Any]]]:
    """Rows of a JSON-lines file, {"text": ...} or {"prompt": ..., "continuation": ...} a line; also
    the objects.

    Special tokens written in a text are recognized, as in a prompt; none are added. Line n's draws
    have the address n, from 0.

    Raises:
        UserError: no such file, not UTF-8, a bad line (its number is given), nothing to score in
            one, or no line at all.
    """
    rows: list[ScoredRow] = []
    records = []
    for where, record in read_jsonl(path, "texts"):
        prompt, text = _parts(record, where)
        ids = tokenizer.encode(text)
        require(
            bool(ids),
            f"{where} has no token to score: its {'text' if 'text' in record else 'continuation'} "
            "is empty.",
        )
        given = tokenizer.encode(prompt)
        rows.append(ScoredRow([*given, *ids], key=len(rows), given=len(given)))
        records.append(record)
    return rows, records


def _parts(record: Any, where: str) -> tuple[str, str]:
    fits = isinstance(record, dict) and (
        ("text" in record) != ("prompt" in record and "continuation" in record)
    )
    prompt, text = (
        (record.get("prompt", ""), record.get("text", record.get("continuation")))
        if fits
        else (None, None)
    )
    if not (isinstance(prompt, str) and isinstance(text, str)):
        raise UserError(
            f'{where} must be {{"text": "..."}} or {{"prompt": "...", "continuation": "..."}}.'
        )
    return prompt, text


def measure(
    checkpoint_folder: Path,
    data_folder: Path | None,
    texts: Path | None,
    out: Path | None,
    device: str,
    config: LikelihoodConfig,
) -> str:
    """The likelihood of held-out rows of `data_folder`, or of `texts`, under a checkpoint of any
    family; returns the table.

    `out`, which must not exist, gets a JSON line a row. Documents of a row are kept apart where
    training kept them apart.

    Raises:
        UserError: no such checkpoint, data of another tokenizer, no held-out rows, bad texts, a
            likelihood that is not finite, or as of `log_likelihoods_stream`.
    """
    require(
        out is None or not out.exists(),
        f"{out} exists and is not overwritten; choose another --out.",
    )
    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    tokenizer = checkpoint.tokenizer
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
    _warn_if_long(rows, checkpoint.trained_seq_len)
    found: dict[int, RowLikelihood] = {}
    with tqdm(
        total=len(rows), desc="likelihood", unit="row", disable=not sys.stderr.isatty()
    ) as bar:
        for number, likelihood in log_likelihoods_stream(checkpoint, rows, config):
            require(
                math.isfinite(likelihood.log_p),
                f"log p of row {number} is not finite ({likelihood.log_p}): the checkpoint may "
                "have diverged; look at it with `cola-train inspect`, or take more steps or "
                "another solver.",
            )
            found[number] = likelihood
            bar.update(1)
    ordered = [found[number] for number in range(len(rows))]
    if out is not None:
        lines = [
            {**record, **dataclasses.asdict(row)}
            for record, row in zip(records, ordered, strict=True)
        ]
        write_atomically(
            out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
    num_bytes = sum(len(tokenizer.decode(row.tokens[row.given :]).encode()) for row in rows)
    perplexity = perplexity_of(checkpoint, ordered, config, num_bytes)
    return (
        f"{checkpoint_folder}, "
        f"{texts or data_folder}\n{checkpoint.describe_likelihood(config)}\n\n{_table(perplexity)}"
    )


def _warn_if_long(rows: Sequence[ScoredRow], trained_seq_len: int | None) -> None:
    long = [
        len(row.tokens)
        for row in rows
        if trained_seq_len is not None and len(row.tokens) > trained_seq_len
    ]
    if long:
        warnings.warn(
            f"{len(long)} of {len(rows)} texts, the longest of {max(long)} tokens, are longer than "
            f"the rows of {trained_seq_len} tokens that this model was trained on; it has seen "
            "nothing longer, and their likelihood may be poor for that alone.",
            stacklevel=3,
        )


def _table(perplexity: Perplexity) -> str:
    rates = {
        "exact" if perplexity.exact else "ELBO" if perplexity.parts else "bound": perplexity.nats
    }
    if perplexity.iwae is not None:
        rates["IWAE"] = perplexity.iwae
    lines = [
        f"{perplexity.num_rows:,} rows, {perplexity.num_tokens:,} tokens",
        f"  {'':8}{'nats per token':>22}{'perplexity':>24}",
    ]
    for name, rate in rates.items():
        error = rate.standard_error
        nats = f"{rate.nats_per_token:.4f}" + ("" if error is None else f" ± {error:.4f}")
        exponent = f"{rate.perplexity:,.4g}" + (
            "" if error is None else f" ± {rate.perplexity * error:,.2g}"
        )
        lines.append(f"  {name:8}{nats:>22}{exponent:>24}")
    if perplexity.iwae is not None and not perplexity.iwae_holds:
        lines.append(
            "  IWAE is no bound with Hutchinson's divergence, whose noise makes it too low; "
            "divergence=exact gives one."
        )
    if perplexity.parts:
        reconstruction, prior, entropy = (
            perplexity.parts[part] for part in ("reconstruction", "prior", "entropy")
        )
        lines.append(
            f"  ELBO = reconstruction {reconstruction:.4f} + prior {prior:.4f} - entropy "
            f"{entropy:.4f}"
        )
    if perplexity.bits_per_byte is not None:
        lines.append(f"  {perplexity.bits_per_byte:.4f} bits per byte")
    return "\n".join(lines) + "\n"

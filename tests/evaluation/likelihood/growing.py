"""How the bound on log p of a trained Cola DLM behaves, on texts that begin its held-out rows:

    python -m tests.evaluation.likelihood.growing checkpoints/my-run --data data/my-rows

Few draws and many must agree within their interval, and of the first 16, 17 ... 24 tokens of a text
none may be less likely than more of them. Exits with 1 where either fails.
"""

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.likelihood.likelihood import RowLikelihood, log_likelihoods
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.registry import load_checkpoint
from cola_train.likelihood.rows import ScoredRow

Texts = list[list[int]]
Growth = Float64[np.ndarray, "texts lengths"]


def error_of(found: RowLikelihood) -> float:
    assert found.standard_error is not None
    return found.standard_error


def agreement(
    checkpoint: Checkpoint, texts: Texts, few: int, many: int, config: LikelihoodConfig
) -> tuple[list[RowLikelihood], list[RowLikelihood], Float64[np.ndarray, " texts"]]:
    """By few draws and by many, and the difference of log p over its standard error."""
    rows = [ScoredRow(text, key) for key, text in enumerate(texts)]
    one, other = (
        log_likelihoods(checkpoint, rows, dataclasses.replace(config, num_samples=count))
        for count in (few, many)
    )
    apart = [
        (a.log_p - b.log_p) / math.hypot(error_of(a), error_of(b))
        for a, b in zip(one, other, strict=True)
    ]
    return one, other, np.array(apart)


def growth(
    checkpoint: Checkpoint, texts: Texts, lengths: range, config: LikelihoodConfig
) -> tuple[Growth, Growth]:
    """What each token adds to -log p of the text before it, nats, and its standard error.

    Both texts have the same draws, so the error is of their difference, draw by draw.
    """
    rows = [
        ScoredRow(text[:length], key, given=length - 1)
        for key, text in enumerate(texts)
        for length in lengths
    ]
    found = log_likelihoods(checkpoint, rows, config)
    shape = (len(texts), len(lengths))
    nats = np.array([-one.log_p for one in found]).reshape(shape)
    return nats, np.array([error_of(one) for one in found]).reshape(shape)


def beginnings(data: PreparedData, count: int, length: int) -> Texts:
    """The first tokens of so many held-out rows, without padding."""
    texts = []
    for number in range(data.num_rows(VALIDATION)):
        tokens = data.row(VALIDATION, number)[0][:length].tolist()
        if data.manifest.pad_token_id not in tokens:
            texts.append(tokens)
    return texts[:count]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=200, help="that grow")
    parser.add_argument("--draws", type=int, default=16, help="of each that grows")
    parser.add_argument("--agreeing", type=int, default=16, help="texts by 64 and 512 draws")
    parser.add_argument("--first", type=int, default=16, help="tokens")
    parser.add_argument("--last", type=int, default=24, help="tokens")
    options = parser.parse_args(arguments)
    checkpoint, data = load_checkpoint(options.checkpoint), PreparedData.open(options.data)
    texts = beginnings(data, max(options.texts, options.agreeing), options.last)
    config = LikelihoodConfig(batch_size=64)
    began = time.process_time()
    few, many, apart = agreement(checkpoint, texts[: options.agreeing], 64, 512, config)
    for count, found in ((64, few), (512, many)):
        tokens = sum(one.num_tokens for one in found)
        nats = -sum(one.log_p for one in found) / tokens
        error = math.hypot(*(error_of(one) for one in found)) / tokens
        print(f"{count} draws: {nats:.4f} nats a token, ± {error:.4f} over draws", flush=True)
    agrees = bool(np.abs(apart).max() < 3 and abs(apart.mean()) < 1)
    print(
        f"{len(apart)} texts of {options.last} tokens; difference over its standard error: "
        f"mean {apart.mean():+.2f}, rms {np.square(apart).mean() ** 0.5:.2f}, largest "
        f"{np.abs(apart).max():.2f}; {time.process_time() - began:.0f} CPU s",
        flush=True,
    )
    began, lengths = time.process_time(), range(options.first + 1, options.last + 1)
    grown = texts[: options.texts]
    config = dataclasses.replace(config, num_samples=options.draws)
    nats, error = growth(checkpoint, grown, lengths, config)
    below, falls = nats < 0, nats + 1.96 * error < 0
    print(
        f"{len(grown)} texts from {options.first} to {options.last} tokens, {options.draws} draws: "
        f"a token adds {nats.mean():.3f} nats (by length "
        f"{', '.join(f'{mean:.2f}' for mean in nats.mean(0))}); least {nats.min():+.3f} ± "
        f"{error.flat[nats.argmin()]:.3f}; below 0: {below.sum()} of {nats.size}, by more than "
        f"the 95 % interval: {falls.sum()}; {time.process_time() - began:.0f} CPU s"
    )
    return 0 if agrees and not falls.any() else 1


if __name__ == "__main__":
    sys.exit(main())

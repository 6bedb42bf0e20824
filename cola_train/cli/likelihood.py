"""The verb likelihood."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_verb, load_settings
from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.settings import require


def add(verbs: Any) -> None:
    """Add the verb."""
    likelihood = add_verb(
        verbs,
        "likelihood",
        _likelihood,
        "log p(x) and perplexity of held-out rows or of texts under a checkpoint of any family",
        LikelihoodConfig,
        example="cola-train likelihood checkpoints/NAME --data data/austen num_samples=8",
        positionals={
            "checkpoint": "a folder in the released layout, a baseline's, or a run folder"
        },
    )
    likelihood.add_argument(
        "--data", type=Path, metavar="FOLDER", help="prepared data, whose held-out rows are taken"
    )
    likelihood.add_argument(
        "--texts",
        type=Path,
        metavar="FILE.jsonl",
        help='texts instead: one {"text": "..."} or {"prompt": "...", "continuation": "..."} per '
        "line",
    )
    likelihood.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="also write each row's figures there, as JSON lines",
    )
    likelihood.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )


def _likelihood(options: argparse.Namespace) -> None:
    require(
        (options.data is None) != (options.texts is None),
        "Give either --data FOLDER (prepared data) or --texts FILE.jsonl.",
    )
    config = load_settings(options)
    from cola_train.evaluation.likelihood.perplexity import measure

    sys.stdout.write(
        measure(
            options.checkpoint, options.data, options.texts, options.out, options.device, config
        )
    )

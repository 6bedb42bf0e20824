"""The verb that writes text: sample."""

import argparse
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_verb, load_settings
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError


def add(verbs: Any) -> None:
    """Add this verb."""
    sample = add_verb(
        verbs,
        "sample",
        _sample,
        "generate text from a checkpoint",
        SamplerConfig,
        example="cola-train sample checkpoints/NAME --prompt 'It is a truth' max_new_tokens=64",
        positionals={"checkpoint": "a folder in the released layout, or a run folder"},
    )
    sample.add_argument(
        "--prompt",
        action="append",
        help="a text to continue; may be given more than once; '' is from nothing",
    )
    sample.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='one {"prompt": "..."} (or {"input_ids": [...]}) per line',
    )
    sample.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="write results there as JSON lines instead of printing text",
    )
    sample.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"
    )


def _sample(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("Give either --prompt TEXT (as often as you like) or --prompts FILE.jsonl.")
    config = load_settings(options)
    from cola_train.evaluation.writing.sample import sample

    sample(options.checkpoint, options.prompt, options.prompts, options.out, options.device, config)

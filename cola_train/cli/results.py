"""Verbs that look at what was trained: sample, report."""

import argparse
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_verb, load_settings
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError


def add(verbs: Any) -> None:
    """Add these verbs."""
    sample = add_verb(
        verbs, "sample", _sample, "generate text from a checkpoint", SamplerConfig,
        example="cola-train sample checkpoints/NAME --prompt 'It is a truth' max_new_tokens=64",
        positionals={"checkpoint": "a folder in the released layout, or a run folder"},
    )  # fmt: skip
    sample.add_argument("--prompt", action="append", help="a text to continue; may be given more than once; '' is from nothing")
    sample.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help='one {"prompt": "..."} (or {"input_ids": [...]}) per line'
    )
    sample.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write results there as JSON lines instead of printing text")
    sample.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one")

    add_verb(
        verbs, "report", _report, "one page on what a joint run has learned, from its export and held-out data", SamplerConfig,
        example="cola-train report checkpoints/NAME-vae checkpoints/NAME guidance_scale=3",
        positionals={"vae_run": "the stage-1 run folder", "joint_run": "the stage-2 run folder; the page goes there, report.md"},
    )  # fmt: skip


def _sample(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("Give either --prompt TEXT (as often as you like) or --prompts FILE.jsonl.")
    config = load_settings(options)
    from cola_train.sampling.prompts import sample

    sample(options.checkpoint, options.prompt, options.prompts, options.out, options.device, config)


def _report(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.evaluation.writing.report import write_report

    print(write_report(options.vae_run, options.joint_run, config))

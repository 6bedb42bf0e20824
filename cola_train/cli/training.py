"""Verbs that train, from text on: tokenizer and rows, the stages, a run from a run; and export."""

import argparse
import dataclasses
import math
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_path, add_settings, add_verb, is_path, load_settings
from cola_train.config.data import PrepareConfig, TokenizerTrainConfig
from cola_train.config.run import RunConfig
from cola_train.config.settings import INTERRUPTED, UserError, require
from cola_train.families.registry import families
from cola_train.run_folder import (
    read_run_config,
    read_status,
    require_data,
    saved_config,
    status_time,
)
from cola_train.run_layout import folder_of


def add(verbs: Any) -> None:
    """Add these verbs."""
    tokenizer = verbs.add_parser("tokenizer", help="make a tokenizer.json: train it, or OLMo 2's")
    kinds = tokenizer.add_subparsers(title="kinds", metavar="KIND", required=True)
    add_verb(
        kinds,
        "train",
        _tokenizer_train,
        "train a byte-level BPE on text",
        TokenizerTrainConfig,
        example="out=data/tokenizer.json 'corpus.inputs=[my_texts]' vocab_size=4096",
    )
    olmo2 = kinds.add_parser(
        "olmo2", help="build the OLMo 2 tokenizer of the paper (needs the extra 'olmo2')"
    )
    olmo2.add_argument("out", type=Path, help="the tokenizer.json to write")
    olmo2.set_defaults(run=_tokenizer_olmo2)

    add_verb(
        verbs,
        "prepare",
        _prepare,
        "tokenize text into memory-mapped rows",
        PrepareConfig,
        example="out=data/austen tokenizer=data/tokenizer.json 'corpus.inputs=[my_texts]'",
    )

    for name, family in families().items():
        train = add_verb(verbs, name, _train, family.summary, family.config, family.example)
        add_path(train, "--resume", "RUN", "resume this run, by its own config and the overrides")
    warm = verbs.add_parser(
        "warm-start",
        help="train a new run that begins with the weights of another, and nothing else of it",
    )
    add_path(warm, "source", "RUN", "the run folder whose latest weights to take")
    add_settings(warm, "the new run's config, then overrides")
    warm.set_defaults(run=_warm_start)

    branch = verbs.add_parser(
        "branch",
        help="resume a run's checkpoint with another end: the anneals of a constant-rate run "
        "(optim.schedule=wsd)",
    )
    add_path(branch, "source", "RUN", "the run folder to branch off")
    branch.add_argument(
        "settings", nargs="+", metavar="key=value", help="name=... and what the end differs in"
    )
    branch.add_argument("--step", type=int, help="which saved step; the latest without it")
    branch.set_defaults(run=_branch)

    export = verbs.add_parser("export", help="write a run's checkpoint in the released layout")
    add_path(export, "run_folder", "RUN", "a run folder, checkpoints/NAME")
    export.add_argument("--step", type=int, help="which saved step; the latest without it")
    add_path(export, "--out", "OUT", "a new folder to write; without it RUN/hf, which is replaced")
    export.add_argument(
        "--average",
        dest="ema",
        action="store_true",
        help="the weights' average (ema.decay) instead",
    )
    export.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="most GB of a weight file (%(default)s)"
    )
    export.set_defaults(run=_export)


def _tokenizer_train(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.data.tokenizer_training import train_tokenizer

    train_tokenizer(config)


def _tokenizer_olmo2(options: argparse.Namespace) -> None:
    from cola_train.data.olmo2 import build_olmo2_tokenizer

    build_olmo2_tokenizer(options.out)


def _prepare(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.data.prepare import prepare

    prepare(config)


def _train(options: argparse.Namespace) -> int:
    if options.resume is None:
        config = load_settings(options)
        require_data(config)
    else:
        from cola_train.training.run import resume

        config = resume(options.resume, options.config_class, options.settings)
    if config.warm_start_from is not None and saved_config(config) is None:
        raise UserError(
            f"warm_start_from={config.warm_start_from} is not set by hand, so that no run begins "
            f"from another by accident: use `cola-train warm-start {config.warm_start_from} ...`, "
            "or leave the key out."
        )
    if config.branched_from is not None and saved_config(config) is None:
        raise UserError(
            f"branched_from={config.branched_from} is not set by hand: use `cola-train branch "
            "RUN`, or leave it out."
        )
    return _run_processes(options.arguments, config)


def _warm_start(options: argparse.Namespace) -> int:
    from cola_train.training.run import warm_started

    options.config_class = type(read_run_config(options.source))
    config = load_settings(options)
    again = dataclasses.replace(config, warm_start_from=str(options.source))
    begun = again if saved_config(again) else warm_started(config, options.source)
    return _run_processes(options.arguments, begun)


def _branch(options: argparse.Namespace) -> int:
    from cola_train.processes import connected
    from cola_train.training.branch import branch

    trunk = read_run_config(options.source)
    # Several processes may be here already, started by torchrun: one of them makes the folder.
    with connected(trunk.trainer.accelerator, trunk.parallel.timeout_seconds) as processes:
        config = processes.agree(lambda: branch(options.source, options.step, options.settings))
    return _run_processes([config.stage, "--resume", str(folder_of(config))], config)


def _run_processes(arguments: Sequence[str], config: RunConfig) -> int:
    """Train in this process, or in several that `arguments` start where they are not here yet."""
    from cola_train.processes import is_one_of_several

    if config.parallel.num_processes == 1 or is_one_of_several():
        from cola_train.training.run import train

        return INTERRUPTED if train(config).state == "interrupted" else 0
    from cola_train.devices import uses_gpu
    from cola_train.operations.launch import launch
    from cola_train.training.preflight import refuse

    refuse(config)
    for text in arguments:
        require(
            not (is_path(text) and Path(text).is_fifo()),
            f"{text} is a pipe, which only one process can read: write the config to a file.",
        )
    folder, on_gpu = folder_of(config), uses_gpu(config.trainer.accelerator)
    before = status_time(folder)
    status = launch(arguments, config.parallel.num_processes, folder, uses_gpu=on_gpu)
    now = read_status(folder)
    if now is None or status_time(folder) == before or status == 128 + signal.SIGKILL:
        return status
    # Whichever process failed or got a signal: what was written since says how far the run got.
    return {"interrupted": INTERRUPTED, "finished": 0}.get(now.state, status)


def _export(options: argparse.Namespace) -> None:
    from cola_train.training.run import export_run

    require(
        0 < options.max_shard_gb < math.inf,
        f"--max-shard-gb must be above 0, not {options.max_shard_gb}.",
    )
    max_shard_bytes = int(options.max_shard_gb * 1e9)
    print(export_run(options.run_folder, options.step, options.out, max_shard_bytes, options.ema))

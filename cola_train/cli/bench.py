"""The verb that measures speed: bench train, sample, growth, data, quality."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from cola_train.bench.config import (
    BenchDataConfig,
    BenchGrowthConfig,
    BenchQualityConfig,
    BenchSampleConfig,
    BenchTrainConfig,
    refuse_existing,
    split_settings,
)
from cola_train.cli.verb import add_device, add_verb, load_settings
from cola_train.files import write_atomically

_OF_RUN = "settings with a dot in their name are the measured run's"


def add(verbs: Any) -> None:
    """Add this verb."""
    bench = verbs.add_parser(
        "bench", help="how fast this machine trains and samples, at what memory; as JSON"
    )
    kinds = bench.add_subparsers(title="kinds", metavar="KIND", required=True)
    add_verb(
        kinds,
        "train",
        _train,
        f"measure optimizer steps on random tokens; {_OF_RUN}",
        BenchTrainConfig,
        example="workload=M rows=4 parallel.activation_checkpointing=full",
    )
    sample = add_verb(
        kinds,
        "sample",
        _sample,
        "measure how fast prompts are continued",
        BenchSampleConfig,
        example="workload=M batch=1 sampler.num_steps=8",
    )
    add_verb(
        kinds,
        "growth",
        _growth,
        f"measure how a step's cost grows with its sizes; {_OF_RUN}",
        BenchGrowthConfig,
        example="figure=growth out=growth.json",
    )
    add_verb(
        kinds,
        "data",
        _data,
        "measure tokenizing, reading rows and opening a huge store",
        BenchDataConfig,
        example="rows=8 seq_len=256",
    )
    quality = add_verb(
        kinds,
        "quality",
        _quality,
        "measure how near few steps of a solver come to many",
        BenchQualityConfig,
        example="checkpoints/NAME solvers=[euler,heun] steps=[4,8,16]",
        positionals={"checkpoint": "a folder in the released layout, or a run folder, of stage 2"},
    )
    add_device(sample)
    add_device(quality)


def _load(options: argparse.Namespace) -> Any:
    """The config, once it is known that its result's file does not exist."""
    config = load_settings(options)
    refuse_existing(None if config.out is None else Path(config.out))
    return config


def _load_with_run(options: argparse.Namespace) -> tuple[Any, list[str]]:
    options.settings, of_run = split_settings(options.settings)
    return _load(options), of_run


def _deliver(result: dict[str, Any], out: str | None) -> None:
    """Write a result to `out`, or to stdout."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_atomically(Path(out), text)


def _train(options: argparse.Namespace) -> None:
    config, of_run = _load_with_run(options)
    from cola_train.bench.worker import run_train

    _deliver(run_train(config, of_run), config.out)


def _sample(options: argparse.Namespace) -> None:
    config = _load(options)
    from cola_train.bench.worker import measure_in_a_process

    device = config.device if options.device == "auto" else options.device
    _deliver(measure_in_a_process("sample", config, device=device), config.out)


def _growth(options: argparse.Namespace) -> None:
    config, of_run = _load_with_run(options)
    from cola_train.bench.growth import run_growth

    _deliver(run_growth(config, of_run), config.out)


def _data(options: argparse.Namespace) -> None:
    config = _load(options)
    from cola_train.bench.data import run_data

    _deliver(run_data(config), config.out)


def _quality(options: argparse.Namespace) -> None:
    config = _load(options)
    from cola_train.bench.quality import run_quality

    _deliver(run_quality(options.checkpoint, config, options.device), config.out)

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
    kinds = bench.add_subparsers(dest="kind", title="kinds", metavar="KIND", required=True)
    add_verb(
        kinds,
        "train",
        _bench,
        f"measure optimizer steps on random tokens; {_OF_RUN}",
        BenchTrainConfig,
        example="workload=M rows=4 parallel.activation_checkpointing=full",
    )
    sample = add_verb(
        kinds,
        "sample",
        _bench,
        "measure how fast prompts are continued",
        BenchSampleConfig,
        example="workload=M batch=1 sampler.num_steps=8",
    )
    add_verb(
        kinds,
        "growth",
        _bench,
        f"measure how a step's cost grows with its sizes; {_OF_RUN}",
        BenchGrowthConfig,
        example="figure=growth out=growth.json",
    )
    add_verb(
        kinds,
        "data",
        _bench,
        "measure tokenizing, reading rows and opening a huge store",
        BenchDataConfig,
        example="rows=8 seq_len=256",
    )
    quality = add_verb(
        kinds,
        "quality",
        _bench,
        "measure how near few steps of a solver come to many",
        BenchQualityConfig,
        example="checkpoints/NAME solvers=[euler,heun] steps=[4,8,16]",
        positionals={"checkpoint": "a folder in the released layout, or a run folder, of stage 2"},
    )
    add_device(sample)
    add_device(quality)


def _bench(options: argparse.Namespace) -> None:
    of_run: list[str] = []
    if options.kind in ("train", "growth"):
        options.settings, of_run = split_settings(options.settings)
    config = load_settings(options)
    refuse_existing(None if config.out is None else Path(config.out))
    if options.kind == "growth":
        from cola_train.bench.growth import run_growth

        result = run_growth(config, of_run)
    elif options.kind == "data":
        from cola_train.bench.data import run_data

        result = run_data(config)
    elif options.kind == "quality":
        from cola_train.bench.quality import run_quality

        result = run_quality(options.checkpoint, config, options.device)
    elif options.kind == "sample":
        from cola_train.bench.worker import measure_in_a_process

        device = config.device if options.device == "auto" else options.device
        result = measure_in_a_process("sample", config, device=device)
    else:
        from cola_train.bench.worker import run_train

        result = run_train(config, of_run)
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if config.out is None:
        sys.stdout.write(text)
    else:
        write_atomically(Path(config.out), text)

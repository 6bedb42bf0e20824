"""`cola-train bench train` and `quality` as verbs: what is measured, and how often."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_train.bench.config import (
    NOVELS,
    BenchQualityConfig,
    BenchTrainConfig,
    MemoryTooSmallError,
)
from cola_train.bench.worker import measure_in_a_process
from cola_train.console import say

# A doubling of the rows must gain as much, or it is the last.
_LEAST_GAIN = 1.01


def run_train(config: BenchTrainConfig, of_run: Sequence[str]) -> dict[str, Any]:
    """Measure a training step in a fresh process; with `find_rows`, at the fastest micro-batch.

    `of_run` are settings of the run that override the workload's, key=value.

    Raises:
        UserError: whatever the settings are refused for; memory that is too small for the first
            micro-batch.
    """
    if not config.find_rows:
        return measure_in_a_process("train", config, of_run)
    rows, tried = find_rows(config, of_run)
    config = dataclasses.replace(config, rows=rows, find_rows=False)
    return {**measure_in_a_process("train", config, of_run), "tried": tried}


def find_rows(config: BenchTrainConfig, of_run: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    """The micro-batch of most tokens per second; and each that was tried.

    These are config.rows (1 by default), twice as many, and so on: until memory ends, or up to a
    doubling that gains less than 1 %.

    Raises:
        UserError: as `run_train`.
    """
    rows = config.rows or 1
    short = dataclasses.replace(config, find_rows=False, profile=False, warmups=1, runs=2)
    tried: list[dict[str, Any]] = []
    while True:
        try:
            found = measure_in_a_process("train", dataclasses.replace(short, rows=rows), of_run)
        except MemoryTooSmallError:
            if not tried:
                raise
            say(f"{rows} rows do not fit into memory.")
            break
        speed = found["tokens_per_second"]
        gains = not tried or speed > _LEAST_GAIN * tried[-1]["tokens_per_second"]
        peak = found["memory"]["peak_bytes"]
        tried.append({"rows": rows, "tokens_per_second": speed, "peak_bytes": peak})
        say(f"{rows} rows: {speed:.6g} tokens/s")
        if not gains:
            break
        rows *= 2
    return max(tried, key=lambda one: one["tokens_per_second"])["rows"], tried


def run_quality(checkpoint_folder: Path, config: BenchQualityConfig, device: str) -> dict[str, Any]:
    """Measure each solver's distance to the reference, by its steps, on a trained checkpoint.

    Also shows it to the user as a table in Markdown.

    Raises:
        UserError: no such checkpoint or device, or prompts that cannot be read.
    """
    from cola_train.devices import named_device
    from cola_train.evaluation.writing.sample import read_prompts
    from cola_train.families.registry import load_checkpoint

    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    encode = checkpoint.tokenizer.encode
    if config.prompts is not None:
        given, _ = read_prompts(Path(config.prompts))
        prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    else:
        prompts = [encode(text)[: config.prompt_tokens] for text in _passages(config.num_prompts)]
    rows = checkpoint.compare_solvers(
        prompts, config.sampler, config.solvers, config.steps, config.reference_steps
    )
    lines = [
        "| solver | steps | network calls | latent RMS error | tokens equal | CPU s a sample |",
        "| --- |" + " ---: |" * 5,
    ]
    lines += [
        f"| {row.solver} | {row.num_steps} | {row.network_calls} | {row.latent_rms_error:.3f} "
        f"| {row.token_agreement:.1%} | {row.cpu_seconds_per_sample:.3f} |"
        for row in rows
    ]
    say("\n".join(lines) + "\n")
    return {
        "checkpoint": str(checkpoint_folder),
        "prompts": len(prompts),
        "reference_steps": config.reference_steps,
        "sampler": dataclasses.asdict(config.sampler),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _passages(count: int) -> list[str]:
    """Long paragraphs of the included novels, spread evenly over them."""
    from cola_train.config.data import CorpusConfig
    from cola_train.data.sources import read_documents

    novels = read_documents(CorpusConfig(inputs=[str(NOVELS)]))
    paragraphs = [text for text in novels if len(text) > 400]
    return [paragraphs[place * len(paragraphs) // count] for place in range(count)]

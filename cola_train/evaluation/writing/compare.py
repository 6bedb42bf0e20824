"""The `compare` verb: the metrics of comparison.py for a run's export, into its metrics.jsonl."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.comparison import Generator, compare
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import generate
from cola_train.families.registry import load_checkpoint
from cola_train.json_lines import JsonlWriter
from cola_train.run_folder import read_run_config, require_data
from cola_train.run_layout import METRICS


def compare_run(run_folder: Path, config: ComparisonConfig) -> str:
    """Judge what a run's export writes after openings of its held-out rows; returns the table.

    The metrics are appended to RUN/metrics.jsonl as comparison/NAME, with the step of the export.

    Raises:
        UserError: no run, no export, or data that is not the one it was trained on.
    """
    run = read_run_config(run_folder)
    require_data(run)
    checkpoint = load_checkpoint(run_folder)
    data = PreparedData.open(run.data.path)
    if data.tokenizer.sha256 != checkpoint.tokenizer.sha256:
        raise UserError(
            f"The data in {run.data.path} has another tokenizer than {run_folder}; put back what "
            "it was trained on."
        )
    found = compare(
        _generator(checkpoint, config.greedy), _generator(checkpoint, config.sampler), data, config
    )
    lines = [
        f"{run_folder}: {found.num_openings} held-out openings, {found.num_new_tokens} new tokens "
        "after each",
        "",
    ]
    values, errors = {}, {}
    for name, estimate in found.estimates.items():
        value, error, count = dataclasses.astuple(estimate)
        values[f"comparison/{name}"] = value
        errors[f"comparison/{name}_standard_error"] = error
        lines.append(f"  {name:34}{value:10.4f} ± {error:.4f}   of {count:,}")
    row = {"step": checkpoint.training["step"], **values, **errors}
    JsonlWriter(run_folder / METRICS).append(row)
    return "\n".join(lines) + "\n"


def _generator(checkpoint: Checkpoint, sampler: SamplerConfig) -> Generator:
    def continue_all(prompts: Sequence[Sequence[int]], num_new: int) -> list[list[int]]:
        config = dataclasses.replace(sampler, max_new_tokens=num_new)
        return [result.token_ids for result in generate(checkpoint, prompts, config)]

    return continue_all

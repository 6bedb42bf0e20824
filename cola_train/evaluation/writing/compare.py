"""The `compare` verb: the metrics of comparison.py for a run's export, into its metrics.jsonl."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_train.bootstrap import Interval
from cola_train.config.settings import UserError
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.writing.brier import brier
from cola_train.evaluation.writing.comparison import Judges, compare_in_pairs
from cola_train.evaluation.writing.conditions import CONDITIONS, conditions_of, refuse_apart
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.evaluation.writing.model_judge import ModelJudge, require_disjoint
from cola_train.evaluation.writing.writers import writer_of
from cola_train.families.registry import load_checkpoint
from cola_train.json_lines import JsonlWriter
from cola_train.run_folder import read_run_config, require_data
from cola_train.run_layout import METRICS, run_of


def compare_run(folder: Path, config: ComparisonConfig, against: Path | None = None) -> str:
    """Judge what a run's export writes after openings of its held-out rows; returns the table.

    `folder` is the run's, or that of its export at a mark (RUN/marks/step-N). The metrics are
    appended to RUN/metrics.jsonl as comparison/NAME, with the step of the export and what they
    depend on besides the model (conditions.py).
    `against` is another checkpoint or run: it continues the same openings, and the table has the
    differences in pairs. If its tokenizer is another, what it writes is encoded anew.

    Raises:
        UserError: no run, no export, data of another tokenizer, `against` was trained on rows of
            another length, or a judge that has no exact likelihood or has seen the text.
    """
    run_folder = run_of(folder) or folder
    run = read_run_config(run_folder)
    require_data(run)
    checkpoint = load_checkpoint(folder)
    data = PreparedData.open(run.data.path)
    seq_len = data.manifest.seq_len
    if data.tokenizer.sha256 != checkpoint.tokenizer.sha256:
        raise UserError(
            f"The data in {run.data.path} has another tokenizer than {folder}; put back what it "
            "was trained on."
        )
    named = [(str(folder), checkpoint)]
    if against is not None:
        named.append((str(against), load_checkpoint(against)))
    conditions = [
        (name, conditions_of(config, each.trained_seq_len or seq_len, each.solver_settings))
        for name, each in named
    ]
    refuse_apart(conditions, "Give a checkpoint that was trained on rows of the same length.")
    writers = [writer_of(each, data.tokenizer, config) for _, each in named]
    model_judge, about_judge = None, []
    if config.judge is not None:
        model_judge = ModelJudge.load(Path(config.judge))
        about_judge = [_about(model_judge, Path(config.judge), [Path(name) for name, _ in named])]
    judges = Judges.train(data, config, model_judge)
    (found, *_), differences = compare_in_pairs(writers, judges, data, config)
    lines = [
        f"{folder}: {found.num_openings} held-out openings, {found.num_new_tokens} new tokens "
        "after each",
        *about_judge,
        "",
    ]
    estimates, less = dict(found.estimates), dict(differences[0]) if differences else {}
    intervals: dict[str, Interval | None] = {}
    if config.brier_places > 0:
        scored, *others = (brier(sampled, data, config) for _, sampled in writers)
        estimates |= scored.estimates()
        intervals = scored.intervals()
        less |= scored.less(others[0]) if others else {}
    row: dict[str, Any] = {"step": checkpoint.training["step"]}
    for name, estimate in estimates.items():
        value, error, count = dataclasses.astuple(estimate)
        row[f"comparison/{name}"] = value
        row[f"comparison/{name}_standard_error"] = error
        line = f"  {name:34}{value:10.4f} ± {error:.4f}   of {count:,}"
        if name in intervals:
            line += "; " + _interval(intervals[name])
        lines.append(line)
    if against is not None:
        lines += ["", f"less {against}, in pairs (95 % interval):", ""]
        for name, one in less.items():
            lines.append(f"  {name:34}{one.value:+10.4f}   {one.low:+.4f} to {one.high:+.4f}")
    hashes = {"judge": judges.tokens.sha256(), "byte_judge": judges.bytes.sha256()}
    if model_judge is not None:
        hashes["model_judge"] = model_judge.weights_xxh3
    row[CONDITIONS] = {**conditions[0][1], **hashes}
    JsonlWriter(run_folder / METRICS).append(row)
    return "\n".join(lines) + "\n"


def _about(judge: ModelJudge, folder: Path, judged: Sequence[Path]) -> str:
    """Which judge it is, by a line; one that has seen a model's text is refused."""
    known = [require_disjoint(folder, other) for other in judged]
    text = "it shares no file of training text with what it judges"
    if not all(known):
        text = "whether it has seen the text it judges is not known here"
    return f"Judge: {folder}, weights {judge.weights_xxh3}; {text}"


def _interval(found: Interval | None) -> str:
    if found is None:
        return "all rows alike, so no interval"
    return f"95 %: {found.low:.4f} to {found.high:.4f}"

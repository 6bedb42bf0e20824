"""Names of the files in a run's folder, and in no other place."""

from pathlib import Path

from cola_train.config.run import RunConfig

CONFIG = "config.yaml"
STATUS = "status.json"
TOKENIZER = "tokenizer.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
STEP_LOG = "steps.jsonl"
ALARM_LOG = "alarms.jsonl"
SAMPLES = "samples.jsonl"
LOSSES_PLOT = "losses.png"
EVALUATION_PLOT = "evaluations.png"
EXPORT = "hf"  # the trained networks, in their family's layout
MARKS = "marks"  # exports at budget.marks
CHECKPOINTS = "lightning"
LATEST = "latest"  # in CHECKPOINTS: names the newest one
BENCHMARKS = "benchmarks"
INSPECTION = "inspection"
LOGS = "logs"
RANKS = "processes.json"  # in LOGS/START-LAUNCHER: the process numbers of its ranks
LOCK = ".lock"

# Figures of METRICS that are readings of a clock, and so differ between runs that are otherwise
# equal.
CLOCKS = frozenset(
    {"seconds", "tokens_per_second", "tokens_per_second_per_device", "mfu", "hfu", "eta_seconds"}
)


def folder_of(config: RunConfig) -> Path:
    """The folder of a run."""
    return Path(config.runs_folder) / config.name


def run_of(folder: Path) -> Path | None:
    """The run that a folder is, or whose export it is; None of an export that lies elsewhere."""
    for run, is_one in (
        (folder, True),
        (folder.parent, folder.name == EXPORT),
        (folder.parent.parent, folder.parent.name == MARKS),
    ):
        if is_one and (run / CONFIG).is_file():
            return run
    return None

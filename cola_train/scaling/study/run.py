"""`cola-train study run`: train and measure what a study lacks."""

import functools
from collections.abc import Sequence
from pathlib import Path

from cola_train.config.run import RunConfig
from cola_train.console import say
from cola_train.data.prepared import PreparedData
from cola_train.files import write_errors_explained
from cola_train.run_folder import locked, read_run_config, read_status
from cola_train.scaling.children import exit_status, finish, is_finished
from cola_train.scaling.study.config import StudyConfig
from cola_train.scaling.study.measuring import is_measured, measure, missing_parts
from cola_train.scaling.study.results import RESULTS, Result, Results
from cola_train.scaling.study.table_text import TABLE, write_table
from cola_train.scaling.study.trials import TrialRun, settings_of, trial_runs


def run_study(spec: StudyConfig, spec_folder: Path, *, retry: bool, parallel: int) -> int:
    """Run a study here, `parallel` runs at a time; write results.jsonl and its tables.

    The same call resumes. What results.jsonl has is not done again, even where the run's folder is
    gone. Returns the exit status: 1 if something is not finished.

    Raises:
        UserError: an error in the spec, in a run's config or in results.jsonl, data that are not
            there, before anything is trained; another process is at work on the study.
    """
    runs = trial_runs(spec, spec_folder)
    for path in dict.fromkeys(run.config.data.path for run in runs):
        PreparedData.open(path)
    folder = Path(spec.folder)
    with write_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "give the study another `folder`."):
        results = Results(folder / RESULTS)
        todo, unfinished = _todo(spec, runs, results, retry)
        do = functools.partial(measure, spec, results)
        is_trained = functools.partial(_is_trained, folder)
        for outcomes in finish(
            folder, todo, do, retry=retry, parallel=parallel, is_trained=is_trained
        ):
            for run in todo:
                if outcomes.get(run.name) == "failed":
                    _keep_failure(results, run, folder)
            write_table(spec, runs, results)
            unfinished |= {name: None for name, end in outcomes.items() if end != "finished"}
        write_table(spec, runs, results)
    measured = sum(is_measured(spec, run, results.of(run)) for run in runs)
    say(f"{measured} of {len(runs)} runs are measured: {folder / TABLE}")
    return exit_status(folder, unfinished)


def _todo(
    spec: StudyConfig, runs: Sequence[TrialRun], results: Results, retry: bool
) -> tuple[list[TrialRun], dict[str, None]]:
    """The runs to train or measure, and the names of those that are left as they are."""
    folder = Path(spec.folder)
    wanted, left, failed = set[str](), dict[str, None](), set[str]()
    for run in runs:
        known = results.of(run)
        missing = missing_parts(spec, run, known)
        if known is not None and known.failure is not None and not retry:
            say(f"{run.name} had failed {known.failure} (--retry runs it again)")
            failed.add(run.name)
        elif known is None and not failed.isdisjoint(run.after):
            say(f"{run.name} waits for {', '.join(sorted(failed.intersection(run.after)))}")
            failed.add(run.name)
        elif known is None or known.failure is not None:
            wanted.add(run.name)
            if changes := results.changes(run):
                say(f"{run.name} is not what {RESULTS} has of it: {'; '.join(changes)}")
        elif missing and _is_trained(folder, run):
            wanted.add(run.name)
        elif missing:
            say(
                f"{run.name} is not measured as the spec says ({', '.join(missing)}), and its run "
                f"is gone: to train it again take its line out of {folder / RESULTS}."
            )
            left[run.name] = None
    # Runs that others start from are trained again where they are gone.
    for run in reversed(runs):
        if run.name in wanted and not _is_trained(folder, run):
            wanted.update(run.after)
    todo = [run for run in runs if run.name in wanted]
    return todo, left | dict.fromkeys(run.name for run in runs if run.name in failed)


def _is_trained(folder: Path, run: TrialRun) -> bool:
    """Whether a run's folder holds the run of the spec, trained to its end."""
    place = folder / run.name
    return is_finished(place) and _same(read_run_config(place), run.config)


def _same(saved: RunConfig, config: RunConfig) -> bool:
    if saved.stage != config.stage or saved.seed != config.seed:
        return False
    ours, theirs = settings_of(config), settings_of(saved)
    if config.trainer.precision == "auto":  # which was decided when the run began
        theirs.pop("trainer.precision", None)
        ours.pop("trainer.precision", None)
    return ours == theirs


def _keep_failure(results: Results, run: TrialRun, folder: Path) -> None:
    """Keep why a training failed: it is a result, too."""
    status = read_status(folder / run.name)
    known = results.of(run)
    if status is None or status.state not in ("failed", "stopped"):
        return
    if known is not None and known.failure is None:
        return
    reason = f"at step {status.step}: {status.reason}"
    results.put(Result(run.trial, run.seed, run.made_of, {}, {}, {}, {}, reason))

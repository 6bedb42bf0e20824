"""Verbs about compute and many runs: plan, match, compare, curve, study."""

import argparse
import sys
from pathlib import Path
from typing import Any

from cola_train.cli.verb import (
    add_count,
    add_path,
    add_settings,
    add_verb,
    is_path,
    load_run,
    load_settings,
)
from cola_train.config.load import load_config
from cola_train.config.settings import require
from cola_train.evaluation.writing.config import ComparisonConfig
from cola_train.scaling.config import CurveConfig
from cola_train.scaling.study.config import StudyConfig

_CURVE = "configs/small/curve_austen.yaml"
_STUDY = "configs/small/study_austen.yaml"


def add(verbs: Any) -> None:
    """Add these verbs."""
    plan = verbs.add_parser("plan", help="what a run is, costs and needs, before it is launched")
    add_settings(plan, "the run's config, of any stage, then overrides")
    plan.add_argument(
        "--device",
        default="H100",
        help="what it shall run on (%(default)s): A100, H100, 'H100 PCIe', H200, B200, MI300X",
    )
    add_count(plan, "--devices", 8, "how many of them (%(default)s)")
    add_count(plan, "--per-node", 8, "how many on one machine (%(default)s)")
    plan.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak that is useful work (%(default)s)"
    )
    plan.add_argument("--price", type=float, help="of a device-hour")
    plan.add_argument(
        "--at",
        action="append",
        default=[],
        metavar="AMOUNT",
        help="also say the cost at '10000' steps, '2e9 tokens', '100 EFLOPs'",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.set_defaults(run=_plan)

    match = verbs.add_parser(
        "match",
        help="sizes of the other families that are equal to a joint run's, and how fair that is",
    )
    add_settings(match, "the stage-2 run's config, then overrides")
    match.add_argument(
        "--equal",
        choices=("parameters", "flops", "tokens"),
        default="parameters",
        help="in what (%(default)s)",
    )
    match.add_argument("--json", action="store_true", help="one JSON object instead of text")
    match.set_defaults(run=_match)

    compare = add_verb(
        verbs,
        "compare",
        _compare,
        "judge what a run's export writes, by metrics that are the same for all families",
        ComparisonConfig,
        example="checkpoints/NAME num_openings=128",
        positionals={
            "run_folder": "a run of any family, or its marks/step-N; metrics go into its "
            "metrics.jsonl"
        },
    )
    add_path(
        compare,
        "--against",
        "CHECKPOINT",
        "continue the same openings with this one too; differences in pairs, with intervals",
    )

    curve = verbs.add_parser("curve", help="scaling curves: families x sizes x budgets")
    kinds = curve.add_subparsers(dest="kind", title="kinds", metavar="KIND", required=True)
    run = _add_curve_verb(
        kinds, "run", "train and measure every point of a ladder; resumes where it ended"
    )
    _add_running(run)
    add_path(run, "--write-lines", "FOLDER", "train nothing: write a launch line per run there")
    run.add_argument(
        "--launcher", default="cola-train", help="what the lines start trainings with (%(default)s)"
    )
    _add_curve_verb(kinds, "fit", "fit power laws and IsoFLOP parabolas to the points")
    _add_curve_verb(kinds, "plot", "draw quality over compute, with the fits")

    study = verbs.add_parser("study", help="experiments: named trials of a run config, compared")
    kinds = study.add_subparsers(dest="kind", title="kinds", metavar="KIND", required=True)
    for name, summary in (
        ("run", "train and measure every trial that has no result yet; resumes where it ended"),
        ("table", "the results by trial, with differences, on the console and as files"),
    ):
        added = add_verb(kinds, name, _study, summary, StudyConfig, _STUDY)
        if name == "run":
            _add_running(added)
        else:
            added.add_argument(
                "--by-figure", action="store_true", help="a line a figure, for few trials"
            )


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--retry", action="store_true", help="run again what has failed")
    add_count(parser, "--parallel", 1, "runs at a time (%(default)s)")


def _add_curve_verb(kinds: Any, name: str, summary: str) -> argparse.ArgumentParser:
    return add_verb(kinds, name, _curve, summary, CurveConfig, _CURVE)


def _plan(options: argparse.Namespace) -> None:
    config = load_run(options)
    from cola_train.scaling.plan import Fleet, make_plan, show

    fleet = Fleet(options.device, options.devices, options.per_node, options.mfu, options.price)
    sys.stdout.write(show(make_plan(config, fleet, options.at), options.json))


def _match(options: argparse.Namespace) -> None:
    config = load_run(options)
    from cola_train.scaling.match import fairness, show

    sys.stdout.write(show(fairness(config, options.equal), options.json))


def _compare(options: argparse.Namespace) -> None:
    config = load_settings(options)
    from cola_train.evaluation.writing.compare import compare_run

    sys.stdout.write(compare_run(options.run_folder, config, options.against))


def _load_spec(options: argparse.Namespace, what: str, example: str) -> tuple[Any, Path]:
    """The spec of a curve or study, and the folder it lies in."""
    missing = f"Give the {what}'s spec, for example {example}."
    require(bool(options.settings) and is_path(options.settings[0]), missing)
    if options.kind == "run":
        require(options.parallel >= 1, f"--parallel must be at least 1, not {options.parallel}.")
    path = Path(options.settings[0])
    return load_config(options.config_class, path, options.settings[1:]), path.parent


def _curve(options: argparse.Namespace) -> int:
    spec, folder = _load_spec(options, "curve", _CURVE)
    if options.kind == "run":
        from cola_train.scaling.curve import run_curve, write_launch_lines

        if options.write_lines is None:
            return run_curve(spec, folder, retry=options.retry, parallel=options.parallel)
        for path in write_launch_lines(spec, folder, options.write_lines, options.launcher):
            print(path)
        return 0
    if options.kind == "fit":
        from cola_train.scaling.fit import write_fit

        sys.stdout.write(write_fit(spec))
        return 0
    from cola_train.scaling.figure import draw

    for path in draw(spec):
        print(path)
    return 0


def _study(options: argparse.Namespace) -> int:
    spec, folder = _load_spec(options, "study", _STUDY)
    if options.kind == "run":
        from cola_train.scaling.study.run import run_study

        return run_study(spec, folder, retry=options.retry, parallel=options.parallel)
    from cola_train.scaling.study.table_text import show_table

    sys.stdout.write(show_table(spec, folder, options.by_figure))
    return 0

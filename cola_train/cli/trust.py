"""Verbs for trust: doctor, audit, chaos."""

import argparse
from pathlib import Path
from typing import Any

from cola_train.cli.verb import CONFIG_METAVAR
from cola_train.families.registry import load_run_config


def add(verbs: Any) -> None:
    """Add these verbs."""
    audit = verbs.add_parser(
        "audit",
        help=(
            "check from a run's log that every step used the samples it had to, whatever happened"
        ),
    )
    audit.add_argument(
        "run_folder", type=Path, metavar="RUN", help="a run folder, checkpoints/NAME"
    )
    audit.set_defaults(run=_audit)

    chaos = verbs.add_parser(
        "chaos",
        help=(
            "kill, stop and damage a small copy of a run, and see whether it comes to the same end"
        ),
    )
    chaos.add_argument(
        "settings",
        nargs="+",
        metavar=CONFIG_METAVAR,
        help="the run's config, of either stage, then overrides",
    )
    chaos.add_argument(
        "--kills", type=int, default=20, metavar="N", help="how many disturbances (%(default)s)"
    )
    chaos.add_argument(
        "--steps",
        type=int,
        default=60,
        metavar="S",
        help="optimizer steps of each run (%(default)s)",
    )
    chaos.add_argument(
        "--processes",
        type=_counts,
        metavar="N,N,...",
        help="numbers of processes to go round at each restart",
    )
    chaos.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the kinds and moments of the disturbances (%(default)s)",
    )
    chaos.set_defaults(run=_chaos)

    doctor = verbs.add_parser(
        "doctor",
        help=(
            "what this machine or job offers a training, how fast it is, and what is wrong with it"
        ),
    )
    doctor.add_argument(
        "--folder",
        type=Path,
        default=Path("checkpoints"),
        help="where runs lie or will lie (%(default)s)",
    )
    doctor.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="measure bandwidth between this many processes (%(default)s); torchrun overrules it",
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    doctor.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from cola_train.operations.doctor import doctor

    return doctor(options.folder, options.processes, options.json)


def _audit(options: argparse.Namespace) -> int:
    from cola_train.operations.audit import audit

    return audit(options.run_folder)


def _counts(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _chaos(options: argparse.Namespace) -> int:
    config = load_run_config(Path(options.settings[0]), options.settings[1:])
    from cola_train.operations.chaos import chaos

    return chaos(config, options.kills, options.processes, options.steps, options.seed)

"""Verbs for trust: doctor, audit, chaos."""

import argparse
from pathlib import Path
from typing import Any

from cola_train.cli.verb import add_count, add_path, add_settings, load_run


def add(verbs: Any) -> None:
    """Add these verbs."""
    audit = verbs.add_parser(
        "audit",
        help="check from a run's log that every step used the samples it had to, whatever happened",
    )
    add_path(audit, "run_folder", "RUN", "a run folder, checkpoints/NAME")
    audit.set_defaults(run=_audit)

    chaos = verbs.add_parser(
        "chaos",
        help="kill, stop and damage a small copy of a run, and see whether its end is the same",
    )
    add_settings(chaos, "the run's config, of either stage, then overrides")
    add_count(chaos, "--kills", 20, "how many disturbances (%(default)s)")
    add_count(chaos, "--steps", 60, "optimizer steps of each run (%(default)s)", metavar="S")
    chaos.add_argument(
        "--processes",
        type=_counts,
        metavar="N,N,...",
        help="numbers of processes of the starts, in turn",
    )
    kinds = "of the kinds and moments of the disturbances (%(default)s)"
    add_count(chaos, "--seed", 0, kinds, metavar="SEED")
    chaos.set_defaults(run=_chaos)

    doctor = verbs.add_parser(
        "doctor",
        help="what this machine or job offers a training, how fast it is, and what is wrong",
    )
    where = "where runs lie or will lie (%(default)s)"
    add_path(doctor, "--folder", "FOLDER", where, default=Path("checkpoints"))
    add_count(
        doctor,
        "--processes",
        1,
        "measure bandwidth between this many processes (%(default)s); torchrun overrules it",
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
    config = load_run(options)
    from cola_train.operations.chaos import chaos

    return chaos(config, options.kills, options.processes, options.steps, options.seed)

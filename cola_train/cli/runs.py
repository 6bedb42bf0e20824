"""The verb that lists runs."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from cola_train.console import say


def add(verbs: Any) -> None:
    """Add this verb."""
    runs = verbs.add_parser("runs", help="list the runs in a folder: how each stands, step, loss")
    runs.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("checkpoints"),
        metavar="FOLDER",
        help="the folder that holds them, or one run's (checkpoints)",
    )
    runs.add_argument(
        "--json", action="store_true", help="a JSON list, with the reason of each state"
    )
    runs.set_defaults(run=_runs)


def _runs(options: argparse.Namespace) -> None:
    from cola_train.operations.runs import list_runs, table

    found = list_runs(options.folder)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=1, ensure_ascii=False))
    elif found:
        print(table(found))
    else:
        say(f"There are no runs in {options.folder}.")

"""The command line: parse, load the config, hand over; heavy imports wait until that succeeds."""

import argparse
import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from cola_train.cli import bench, evaluation, runs, scaling, training, trust
from cola_train.cli.verb import dashes_hint
from cola_train.config.settings import UserError
from cola_train.console import has_no_reader, open_standard_streams, outliving_console


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0 done, 1 failure, 2 wrong input, 75 stopped by a signal after saving, 130 interrupted at once.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # A notebook's kernel names a backend that matplotlib may not find; we draw to files alone.
    os.environ["MPLBACKEND"] = "agg"
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse gives a `*` positional only what stands together: settings may also follow the
    # options.
    if any(argument.startswith("-") for argument in rest) or (
        rest and not hasattr(options, "settings")
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{dashes_hint(options, rest)}")
    if rest:
        options.settings += rest
    options.arguments = arguments
    # What a terminal cannot show is escaped: a text that was generated must not fail there.
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    try:
        return options.run(options) or 0
    except UserError as error:
        _print_error(str(error))
        return 2
    except KeyboardInterrupt:
        print("cola-train: interrupted", file=sys.stderr)
        return 130


def run() -> NoReturn:
    """The program: `main`, and an end that fits how the process was started."""
    open_standard_streams()
    with outliving_console():
        status = _ended()
        if "torch" in sys.modules:
            from cola_train.processes import end_process, is_one_of_several

            if is_one_of_several():
                end_process(status)
    sys.exit(status)


def _ended() -> int:
    """Run `main`; the exit status, whatever it raised. A traceback is for our own defects alone."""
    try:
        try:
            status = main()
        except SystemExit as end:  # of argparse, after its help or its message
            status = int(end.code or 0)
        sys.stdout.flush()
        return status
    except OSError as error:
        if has_no_reader(sys.stdout):
            return 1  # as of `| head`: it has all that it wanted
        about = "" if error.filename is None else f" ({error.filename})"
        _print_error(
            f"{error.strerror or error}{about}. What was written before is kept: mend that, and "
            "give the same command again."
        )
        return 1
    except MemoryError:
        _print_error(
            "There is not enough memory. What was written before is kept: stop other programs or "
            "ask for less (smaller batches, fewer processes), and give the same command again."
        )
        return 1
    except Exception:
        traceback.print_exc()
        versions = _versions()
        _print_error(
            f"This is a defect of cola-train, not a mistake of yours. Report the lines above with "
            f"the command and the versions ({versions}, Python {platform.python_version()}) where "
            "you got cola-train; leave out what they show of private text."
        )
        return 1


def _print_error(message: str) -> None:
    print(f"cola-train: error: {message}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """The program's parser, with all verbs."""
    parser = argparse.ArgumentParser(
        prog="cola-train",
        description="Train Cola DLM, a continuous latent diffusion language model.",
        epilog="The order of work: tokenizer, prepare, vae (stage 1), joint (stage 2), sample. "
        "`cola-train VERB --help` shows the settings that people change, `cola-train VERB "
        "--help all` every one.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="this version, and torch's")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for group in (training, runs, evaluation, scaling, trust, bench):
        group.add(verbs)
    return parser


class _Version(argparse.Action):
    """Prints the versions."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: object) -> NoReturn:
        print(_versions())
        parser.exit()


def _versions() -> str:
    """Ours, and torch's from its package's files, for importing it takes seconds."""
    versions = {}
    for package in ("cola-train", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "(not installed)"
    return f"cola-train {versions['cola-train']}, torch {versions['torch']}"

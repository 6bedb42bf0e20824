"""What a setting is: a frozen dataclass field with one sentence that gives its meaning and unit."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

# The exit status of a run that a signal stopped, saved and fit to go on: "try again" (EX_TEMPFAIL).
INTERRUPTED = 75


class UserError(ValueError):
    """Something the user gave is wrong. The command line prints the message alone, without a
    traceback.

    The message names the rule, the value that was given, what is allowed and the next step.
    """


def setting(default: Any = dataclasses.MISSING, *, help: str, common: bool = False) -> Any:
    """A dataclass field of a config.

    Args:
        default: its default; without one it must be given.
        help: one sentence, shown by `--help` and in docs/config.md.
        common: it is one of the few that people change, which the first screen of `--help` shows.
    """
    metadata = {"help": help, "common": common}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        value = default
        return dataclasses.field(default_factory=lambda: value, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(config_class: type, *, help: str, common: bool = True) -> Any:
    """A nested config, built from its own defaults; without `common`, none of its settings is
    common where it is nested.
    """
    return dataclasses.field(
        default_factory=config_class, metadata={"help": help, "common": common}
    )


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest allowed one, or all of
    them.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Refuse a user's value with one clear message."""
    if not condition:
        raise UserError(message)

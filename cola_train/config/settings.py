"""What a setting is: a frozen dataclass field with one sentence that gives its meaning and unit."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# The exit status of a run that a signal stopped after saving: "try again" (EX_TEMPFAIL).
INTERRUPTED = 75


class UserError(ValueError):
    """Something the user gave is wrong; the command line prints the message without a traceback.

    The message names the rule, the value that was given, what is allowed and the next step.
    """


def setting(default: Any = dataclasses.MISSING, *, help: str, common: bool = False) -> Any:
    """A dataclass field of a config; without a default it must be given.

    `help` is one sentence, shown by `--help` and in docs/config.md; `common` settings are the few
    that people change, which the first screen of `--help` shows.
    """
    metadata = {"help": help, "common": common}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(config_class: type, *, help: str, common: bool = True) -> Any:
    """A nested config with its own defaults; without `common` none of its settings is common."""
    metadata = {"help": help, "common": common}
    return dataclasses.field(default_factory=config_class, metadata=metadata)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of a message about an unknown name: the closest allowed one, or all of them."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(names)}"


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


class Rule(NamedTuple):
    """What the numbers of a setting must be: in words, for messages, and as a test."""

    words: str
    holds: Callable[[float], bool]


SEED = Rule("in [0, 2^63)", lambda seed: 0 <= seed < 2**63)
SHARE_BELOW_1 = Rule("in [0, 1)", lambda share: 0 <= share < 1)


def at_least(least: int, note: str = "") -> Rule:
    """A number of at least `least`; `note` ends the words."""
    return Rule(f"at least {least}{note}", lambda value: value >= least)


def above_0(note: str = "") -> Rule:
    """A number above 0; `note` ends the words."""
    return Rule(f"above 0{note}", lambda value: value > 0)


def require_each(config: object, prefix: str, rule: Rule, *names: str) -> None:
    """Refuse a config unless `rule` holds for each of these settings; null is not checked."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or rule.holds(value), f"{prefix}{name} must be {rule.words}, not {value}."
        )

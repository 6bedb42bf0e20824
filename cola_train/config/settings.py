"""What a setting is: a frozen dataclass field with one sentence that gives its meaning and unit."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, get_args

# The exit status of a run that a signal stopped after saving: "try again" (EX_TEMPFAIL).
INTERRUPTED = 75


class UserError(ValueError):
    """Something the user gave is wrong; the command line prints the message without a traceback.

    The message names the rule, the value that was given, what is allowed and the next step.
    """


class Rule(NamedTuple):
    """What the value of a setting must be: in words, for messages and the help, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    common: bool = False,
    rule: Rule | None = None,
) -> Any:
    """A dataclass field of a config; without a default it must be given.

    `help` is one sentence, shown by `--help` and in docs/config.md; `common` settings are the few
    that people change, which the first screen of `--help` shows. `rule` is what the value must be,
    where its type does not say all; every number has one. Null is not held against it.
    """
    metadata = {"help": help, "common": common, "rule": rule}
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


ANY_NUMBER = Rule("a finite number", lambda value: -math.inf < value < math.inf)
SEED = Rule("in [0, 2^63)", lambda seed: 0 <= seed < 2**63)
BETWEEN_0_AND_1 = Rule("in (0, 1)", lambda share: 0 < share < 1)
SHARE = Rule("in [0, 1]", lambda share: 0 <= share <= 1)
SHARE_ABOVE_0 = Rule("in (0, 1]", lambda share: 0 < share <= 1)
SHARE_BELOW_1 = Rule("in [0, 1)", lambda share: 0 <= share < 1)
NOT_EMPTY = Rule("at least one", lambda values: len(values) > 0)


def at_least(least: float, note: str = "") -> Rule:
    """A finite number of at least `least`; `note` ends the words."""
    return Rule(f"at least {least}{note}", lambda value: least <= value < math.inf)


def above_0(note: str = "") -> Rule:
    """A finite number above 0; `note` ends the words."""
    return Rule(f"above 0{note}", lambda value: 0 < value < math.inf)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that belong together; made only of values that their rules allow.

    Raises:
        UserError: a value that its rule forbids.
    """

    def __post_init__(self) -> None:
        """Checks each value; a subclass with more to check calls this first."""
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name), f"{type(self).__name__}.{field.name}")


def check_value(field: dataclasses.Field[Any], value: Any, key: str) -> None:
    """Refuse a value that the rule of its setting forbids; `key` is its name in the message."""
    rule: Rule | None = field.metadata.get("rule")
    require(
        rule is None or value is None or rule.holds(value),
        f"{key} must be {allowed_words(field)}, not {value}.",
    )
    # No path has it, and it is never meant.
    require(
        not (isinstance(value, str) and "\0" in value), f"{key} has a NUL character; remove it."
    )
    # What the shell or another tool would replace: here it would become the name of a folder.
    require(
        not (isinstance(value, str) and "${" in value),
        f"{key} is {value!r}, and nothing is replaced in a config: write the value itself, or let "
        f'the shell replace it, as in {key}="$NAME".',
    )


def allowed_words(field: dataclasses.Field[Any]) -> str:
    """What the rule of a setting allows, null included; nothing where it has no rule."""
    rule: Rule | None = field.metadata.get("rule")
    or_null = " or null" if type(None) in get_args(field.type) else ""
    return f"{rule.words}{or_null}" if rule else ""


def require_each(config: object, prefix: str, rule: Rule, *names: str) -> None:
    """Refuse a config unless `rule` holds for each of these settings; null is not checked."""
    for name in names:
        value = getattr(config, name)
        require(
            value is None or rule.holds(value), f"{prefix}{name} must be {rule.words}, not {value}."
        )

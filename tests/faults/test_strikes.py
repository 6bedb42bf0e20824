"""Whatever file operation of a command is the last that it does, or fails: one clear error, and the
same command again comes to what an unharmed one leaves, to the bit.

A sample of all strikes; COLA_TRAIN_FAULTS=all strikes every operation of every verb in every mode.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.library import MODES, Mode, missing
from tests.faults.scenarios import SCENARIOS
from tests.faults.strikes import Suite, table

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]
_NUMBER = 60


def sample() -> list[tuple[str, float, Mode]]:
    """Verbs, shares of their operations and modes, each spread evenly."""
    generator, drawn = random.Random("faults"), []
    for place, verb in enumerate(SCENARIOS):
        number = _NUMBER // len(SCENARIOS) + (place < _NUMBER % len(SCENARIOS))
        modes = [MODES[index % len(MODES)] for index in range(number)]
        generator.shuffle(modes)
        drawn += [(verb, (i + generator.random()) / number, mode) for i, mode in enumerate(modes)]
    return drawn


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    made = Suite(tmp_path_factory.mktemp("faults") / "suite")
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(("verb", "share", "mode"), sample())
def test_a_command_that_is_struck_ends_well_when_given_again(
    suite: Suite, verb: str, share: float, mode: Mode
) -> None:
    strikes = [strike for strike in suite.strikes(verb) if strike.mode == mode]
    outcome = suite.strike(verb, strikes[int(share * len(strikes))])
    assert not outcome.faults, outcome


# Strikes that once did harm: what was left, said or missing.
FOUND: list[tuple[str, str, str, Mode]] = [
    ("tokenizer train", "0", "write .own.json.*", "kill"),
    ("tokenizer train", "0", "unlink .own.json.*", "EIO"),
    ("tokenizer train", "0", "fsync .", "ENOSPC"),
    ("prepare", "0", "unlink .own.*/.tokenizer.json.*", "EIO"),
    ("prepare", "0", "rename own", "kill"),
    ("vae", "0", "create checkpoints/run/.summary.json.*", "kill"),
    ("vae", "0", "rename checkpoints/run/lightning/latest", "EIO"),
    ("vae", "0", "unlink checkpoints/run/.hf.*/.tokenizer.json.*", "ENOSPC"),
    ("joint, 2 processes", "0", "rename checkpoints/run/logs/.*/processes.json", "full"),
    ("joint, 2 processes", "0.1", "create checkpoints/run/.lock", "kill"),
    ("export", "0", "close checkpoints/run/.lock", "EIO"),
    ("sample --out", "0", "close own.jsonl", "EIO"),
    ("sample --out", "0", "fsync own.jsonl", "EIO"),
]


@pytest.mark.parametrize(("verb", "process", "operation", "mode"), FOUND)
def test_what_once_did_harm_does_none(
    suite: Suite, verb: str, process: str, operation: str, mode: Mode
) -> None:
    outcome = suite.strike(verb, suite.find(verb, process, operation, mode))
    assert outcome.operation == operation
    assert not outcome.faults, outcome


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="others make other calls")
def test_the_guide_has_the_counts_of_this_code(suite: Suite) -> None:
    guide = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
    assert table(suite) in guide.read_text(encoding="utf-8"), "python -m tests.faults --table"


@pytest.mark.skipif(os.environ.get("COLA_TRAIN_FAULTS") != "all", reason="hours: every strike")
@pytest.mark.timeout(0)
@pytest.mark.parametrize("verb", SCENARIOS)
def test_no_operation_of_a_command_is_one_that_it_cannot_do_without(
    suite: Suite, verb: str
) -> None:
    outcomes = (suite.strike(verb, strike) for strike in suite.strikes(verb))
    assert [outcome for outcome in outcomes if outcome.faults] == []

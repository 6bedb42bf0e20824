"""Strike a command's file operations one at a time, and look at what is left."""

import collections
import contextlib
import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from cola_train.run_folder import read_status
from cola_train.run_layout import LOCK
from tests.faults.library import MODES, TAKES_ROOM, Mode, Operation, Strike, build
from tests.faults.scenarios import SCENARIOS, Result, Scenario, make_inputs, names, workspace
from tests.faults.server import Ended, Server

_FULL = "No space left on device"
_SAYS = {"EIO": "Input/output error", "ENOSPC": _FULL, "full": _FULL}
# A name that is made to be renamed, in which chance stands.
_CHANCE = re.compile(r"\.[0-9a-f]{16}\b|\.tmp\w{6}|\d{8}-\d{6}-\d+")


@dataclasses.dataclass(frozen=True)
class Unharmed:
    """What a command does and leaves where nothing fails."""

    operations: Sequence[Operation]
    result: Result
    names: set[str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a strike did.

    Attributes:
        operation: that was struck, with what is chance in its path left out.
        status: how the struck command ended.
        said: what it said.
        again: what the same command said the second time.
        faults: what is not as promised.
    """

    verb: str
    strike: Strike
    operation: str
    status: int
    said: str
    again: str
    faults: list[str]


class Suite:
    """The library, a server and inputs, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "server").mkdir(parents=True)
        self.server = Server(build(folder), folder / "server")
        self._inputs = folder / "inputs"
        make_inputs(self.server, self._inputs)
        self._unharmed: dict[str, Unharmed] = {}
        self._number = 0

    def close(self) -> None:
        self.server.__exit__(None, None, None)

    def unharmed(self, verb: str) -> Unharmed:
        """Run it where nothing fails; once."""
        if verb not in self._unharmed:
            scenario, folder = SCENARIOS[verb], self._workspace(verb)
            ended = self.server.run(scenario.arguments, folder)
            if ended.status:
                raise RuntimeError(f"{verb}: {ended.said}")
            self._unharmed[verb] = Unharmed(ended, scenario.result(folder), names(folder))
            shutil.rmtree(folder)
        return self._unharmed[verb]

    def strikes(self, verb: str) -> list[Strike]:
        """Every operation of a command, in every mode."""
        each = self.unharmed(verb).operations
        return [Strike(one.process, one.number, mode) for one in each for mode in MODES]

    def find(self, verb: str, process: str, operation: str, mode: Mode) -> Strike:
        """The first strike of an operation, as `Outcome` calls it."""
        for one in self.unharmed(verb).operations:
            if one.process == process and _called(one) == operation:
                return Strike(process, one.number, mode)
        raise LookupError(f"{verb} has no operation {operation}")

    def strike(self, verb: str, strike: Strike) -> Outcome:
        """Strike one operation of a command, give the command again, and compare."""
        unharmed, scenario, folder = self.unharmed(verb), SCENARIOS[verb], self._workspace(verb)
        first = self.server.run(scenario.arguments, folder, strike)
        struck = [operation for operation in first if operation.struck]
        faults = [] if struck else ["nothing was struck"]
        faults += _ending_faults(strike, first)
        if struck and not _is_harmless(struck[0], strike.mode):
            faults += _silence(strike, first)
        faults += _falsehood(scenario, unharmed, folder, first)
        faults += _status_faults(folder)
        again = self.server.run(scenario.arguments, folder)
        faults += _faults_after(scenario, unharmed, folder, first, again)
        if not faults:
            shutil.rmtree(folder)
        operation = _called(struck[0]) if struck else ""
        return Outcome(verb, strike, operation, first.status, first.said, again.said, faults)

    def _workspace(self, verb: str) -> Path:
        self._number += 1
        folder = self.folder / f"{verb.replace(' ', '-')}-{self._number}" / "work"
        workspace(SCENARIOS[verb], self._inputs, folder)
        return folder


def _called(operation: Operation) -> str:
    return _CHANCE.sub(".*", f"{operation.name} {operation.path}")


def _errors(said: str) -> set[str]:
    # Of several processes more than one may say it, and a bar may stand before it.
    return {line.rpartition("error:")[2] for line in said.splitlines() if "error:" in line}


def _is_harmless(operation: Operation, mode: Mode) -> bool:
    """Whether nobody has to be told of this: nothing is lost or different by it."""
    name, path = operation.name, Path(operation.path)
    return (
        mode == "kill"
        # A full disk does this all the same.
        or (mode == "full" and name not in TAKES_ROOM)
        # A folder that is there already; without links another way is taken.
        or name in ("mkdir", "link")
        # What is cleared away is cleared away by the next.
        or name in ("unlink", "rmdir")
        # The lock holds nothing; the launcher closes copies of what a rank logs by.
        or (name == "close" and (path.name == LOCK or path.suffix == ".log"))
        # safetensors does not look at what closing says; we make its files durable afterwards.
        or (name == "close" and path.suffix == ".safetensors")
    )


def _silence(strike: Strike, ended: Ended) -> Iterator[str]:
    if _SAYS[strike.mode] not in ended.said:
        yield f"nothing was said of it (status {ended.status})"


def _falsehood(scenario: Scenario, unharmed: Unharmed, folder: Path, ended: Ended) -> Iterator[str]:
    if scenario.may_exist and "Nothing was changed there" in ended.said:
        with contextlib.suppress(Exception):  # it is not whole
            if scenario.result(folder) == unharmed.result:
                yield "nothing was changed, it said, and yet the result is there"


def _ending_faults(strike: Strike, ended: Ended) -> Iterator[str]:
    """What is wrong with how the struck command ended, and what it said."""
    if "Traceback" in ended.said:
        yield "a traceback"
    if strike.mode == "kill":
        if ended.status == 0:
            yield "killed, it ended as if done"
        return
    if ended.status not in (0, 1, 2):
        yield f"it ended with status {ended.status}"
    if ended.status and len(_errors(ended.said)) != 1:
        yield f"it failed with {len(_errors(ended.said))} errors said"


def _status_faults(folder: Path) -> Iterator[str]:
    """Nothing lives any more: what a run's status says has to be true."""
    for run in (folder / "checkpoints").glob("*"):
        status = read_status(run)
        if status is not None and status.state == "running":
            yield f"after the strike {run.name} counts as running"


def _faults_after(
    scenario: Scenario, unharmed: Unharmed, folder: Path, first: Ended, again: Ended
) -> Iterator[str]:
    """What is wrong after the same command was given again."""
    if "Traceback" in again.said:
        yield "again: a traceback"
    exists = scenario.may_exist and "exists and is not overwritten" in again.said
    if again.status and not exists:
        yield f"again: it ended with status {again.status}"
    try:
        result = scenario.result(folder)
    except Exception as error:  # whatever was left cannot be read
        yield f"the result cannot be read: {type(error).__name__}: {error}"
        return
    for name in unharmed.result.keys() | result.keys():
        if unharmed.result.get(name) != result.get(name):
            yield f"another result: {name}"
    found = names(folder)
    # A config that differs from the one before is kept; none does here.
    yield from (
        f"left behind: {_CHANCE.sub('.*', name)}" for name in sorted(found - unharmed.names)
    )
    for name in sorted(unharmed.names - found):
        # Training goes on without a save or a picture that failed, and says so.
        step = re.search(r"/step-0*(\d+)(/|$)", name)
        told = f"the checkpoint of step {step[1]} was not saved" if step else "were not drawn"
        if not (told in first.said and (step or name.endswith(".png"))):
            yield f"missing: {name}"


def table(suite: Suite) -> str:
    """How many operations each command does, by kind, in Markdown."""
    counts = {
        verb: collections.Counter(one.name for one in suite.unharmed(verb).operations)
        for verb in SCENARIOS
    }
    kinds = sorted({kind for count in counts.values() for kind in count})
    lines = [["", *kinds, "all"], ["---", *["--:"] * (len(kinds) + 1)]]
    for verb, count in counts.items():
        numbers = [str(count[kind]) if count[kind] else "" for kind in kinds]
        lines.append([f"`{verb}`", *numbers, str(count.total())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_json(outcome: Outcome) -> str:
    """A line of the record of a full pass."""
    return json.dumps(dataclasses.asdict(outcome))

"""A process that is started with the library loaded, and starts commands whose imports are done.

`LD_PRELOAD` has to be there when a program begins, so pytest's own process will not do. This one
takes a line of JSON for each command and answers with its exit status.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from cola_train.programs import start
from tests.faults.library import VARIABLE, Control, Operation, Strike, arm
from tests.helpers.programs import ROOT, clean_environment


class Ended(list[Operation]):
    """The operations of a command that has ended, with how it ended and what it said."""

    status: int
    said: str
    seconds: float


class Server:
    """Runs `cola-train` under the library."""

    def __init__(self, library: Path, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            cwd=ROOT,
            env={**clean_environment(), "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        strike: Strike | None = None,
        seconds: float = 300,
    ) -> Ended:
        """Run `cola-train ARGUMENTS` in `folder`, whose file operations are counted.

        Raises:
            TimeoutError: it, or a process that it left behind, lives after so many seconds.
        """
        self._number += 1
        control = Control(self._folder / f"control-{self._number}", folder, strike)
        output = self._folder / f"output-{self._number}"
        job = [list(arguments), str(folder), str(control.path), str(output), seconds]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        started = time.monotonic()
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status = json.loads(self._process.stdout.readline())
        said = output.read_text(encoding="utf-8", errors="replace")
        if status is None:
            raise TimeoutError(f"{' '.join(arguments)} did not end in {seconds:g} s: {said}")
        with control.all_ended(seconds):
            ended = Ended(control.operations())
        ended.status, ended.said, ended.seconds = status, said, time.monotonic() - started
        control.path.unlink()
        output.unlink()
        return ended

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()


def main() -> None:
    multiprocessing.set_forkserver_preload(["cola_train.cli", "tests.faults.preload"])
    for line in sys.stdin:
        arguments, folder, control, output, seconds = json.loads(line)
        environment = {**os.environ, VARIABLE: control}
        with Path(output).open("ab") as file:
            streams = file.fileno(), file.fileno()
            job = start(
                "cola_train",
                arguments,
                streams,
                environment=environment,
                folder=Path(folder),
                first=arm,
            )
        job.join(seconds)
        status = job.exitcode
        if status is None:
            job.kill()
            job.join()
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()

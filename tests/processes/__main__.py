"""Strike `--number` runs, drawn by `--seed`, a line for each as it ends; or print the tables of
docs/reliability.md. Not a test.
"""

import argparse
import tempfile
import time
from pathlib import Path

from cola_train.operations.watched import JobError
from tests.helpers.runs import prepare_small
from tests.processes.doors import (
    mode_table,
    modes,
    socket_table,
    sockets_of_a_run,
    write_everything,
)
from tests.processes.strikes import draw, strike, undisturbed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.processes", description=__doc__)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="these alone, counted from 0")
    parser.add_argument("--out", type=Path, help="a file to append the lines to")
    parser.add_argument("--tables", action="store_true", help="sockets and modes; no strikes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        rows = prepare_small(folder)
        if options.tables:
            _tables(rows, folder)
            return
        (folder / "undisturbed").mkdir()
        usual = undisturbed(rows, folder / "undisturbed")
        for index, case in enumerate(draw(options.number, options.seed)):
            if options.only is not None and index not in options.only:
                continue
            began = time.monotonic()
            try:
                line = strike(case, rows, folder / str(index), usual)
            except JobError as error:
                line = f"FAILED {error}"
            line = f"{index:3} {time.strftime('%H:%M')} {time.monotonic() - began:5.0f} s  {line}"
            print(line, flush=True)
            if options.out is not None:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")


def _tables(rows: Path, folder: Path) -> None:
    (folder / "sockets").mkdir()
    print(socket_table(sockets_of_a_run(rows, folder / "sockets")), end="\n\n")
    found = {}
    for umask in (0o022, 0o077):
        place = folder / f"umask-{umask:03o}"
        place.mkdir()
        write_everything(place, umask)
        found[umask] = modes(place)
    print(mode_table(found))


if __name__ == "__main__":
    main()

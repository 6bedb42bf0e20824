"""Count and strike every file operation of every verb: `python -m tests.faults --help`."""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

from tests.faults.library import Strike
from tests.faults.scenarios import SCENARIOS
from tests.faults.strikes import Suite, table, to_json


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--table", action="store_true", help="the table of counts; strike nothing")
    parser.add_argument("--out", type=Path, help="append an outcome a line; what it has is passed")
    parser.add_argument("--verbs", nargs="+", choices=SCENARIOS, default=[*SCENARIOS])
    parser.add_argument("--only", nargs="+", help="these strikes: 0.1:47:EIO; shows what was said")
    parser.add_argument("--part", default="1/1", help="which of how many equal parts: 2/3")
    options = parser.parse_args()
    part, parts = (int(number) for number in options.part.split("/"))
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder) / "suite")
        try:
            if options.table:
                print(table(suite))
                return 0
            if options.only:
                return strike_some(suite, options.verbs, options.only)
            return strike_all(suite, options.verbs, part - 1, parts, options.out)
        finally:
            suite.close()


def strike_some(suite: Suite, verbs: list[str], only: list[str]) -> int:
    """Returns how many strikes found a fault."""
    found = 0
    for verb in verbs:
        for text in only:
            process, number, mode = text.split(":")
            outcome = suite.strike(verb, Strike(process, int(number), mode))  # type: ignore[arg-type]
            print(f"--- {verb} {text}: {outcome.operation}; status {outcome.status}")
            print(outcome.said, "--- again", outcome.again, *outcome.faults, sep="\n", flush=True)
            found += bool(outcome.faults)
    return found


def strike_all(suite: Suite, verbs: list[str], part: int, parts: int, out: Path | None) -> int:
    """Returns how many strikes found a fault, at most 100."""
    lines = out.read_text().splitlines() if out is not None and out.is_file() else []
    known = [json.loads(line) for line in lines]
    done = {(row["verb"], *row["strike"]) for row in known}
    counts: collections.Counter[str] = collections.Counter()
    for verb in verbs:
        started = time.monotonic()
        for number, strike in enumerate(suite.strikes(verb)):
            if number % parts != part or (verb, *strike) in done:
                continue
            try:
                outcome = suite.strike(verb, strike)
            except TimeoutError as error:
                print(verb, *strike, "HANGS", error, flush=True)
                counts["faults"] += 1
                continue
            counts["struck"] += 1
            if outcome.faults:
                counts["faults"] += 1
                print(verb, *strike, outcome.operation, outcome.faults, flush=True)
            if out is not None:
                with out.open("a") as file:
                    file.write(to_json(outcome) + "\n")
        print(f"{verb}: {time.monotonic() - started:.0f} s", dict(counts), flush=True)
    return min(counts["faults"], 100)


if __name__ == "__main__":
    raise SystemExit(main())

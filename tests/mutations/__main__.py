"""`python -m tests.mutations [COUNT] [SEED]`: change files, and see what the program makes of it.

Prints what went wrong, then how many changes of each kind of file had each outcome.
"""

import argparse
import collections
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from tests.mutations.base import make_base
from tests.mutations.subjects import SUBJECTS
from tests.mutations.trial import ASKED, REFUSED, SAME, attempt, every, judge, trials

_IMPORTS = (
    "cola_train.training.fit",
    "cola_train.evaluation.benchmarks.evaluate",
    "cola_train.evaluation.likelihood.perplexity",
    "cola_train.evaluation.writing.sample",
    "cola_train.data.prepare",
    "cola_train.operations.audit",
    "cola_train.operations.runs",
)


def main() -> int:
    """Run so many trials; 1 if one of them ended otherwise than it may."""
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int, nargs="?", default=320)
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument("--only", default="", help="subjects whose name has this")
    parser.add_argument("--every", help="each file with each change whose name has this instead")
    parser.add_argument("--json", type=Path, help="write the counts and the failures there")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--base", type=Path, help="make the files there, or take those")
    options = parser.parse_args()
    for module in _IMPORTS:
        importlib.import_module(module)
    chosen = tuple(one for one in SUBJECTS if options.only in one.name)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failures: list[str] = []
    worst = {"seconds": 0.0, "bytes": 0}
    with tempfile.TemporaryDirectory() as temporary:
        base, folder = options.base or Path(temporary, "base"), Path(temporary, "trial")
        if not base.exists():
            base.mkdir(parents=True)
            if os.fork() == 0:  # what a training leaves in its process is not for the others
                os.chdir(base)
                make_base()
                os._exit(0)
            if os.wait()[1] != 0:
                return 1
        plain = {}
        if options.every is None:
            found = list(trials(chosen, options.count, options.seed))
        else:
            found = list(every(chosen, options.every))
        for number, trial in enumerate(found):
            if number % 20 == 0:
                print(f"{number} of {len(found)}", file=sys.stderr, flush=True)
            if trial.subject not in plain:
                plain[trial.subject] = attempt(trial.subject, base, folder)
                ended = plain[trial.subject][0]
                if ended.status != 0:
                    sys.exit(f"{trial.subject.name} without a change: {ended}")
            ended, asked = attempt(trial, base, folder)
            outcome, problem = judge(trial, ended, asked, plain[trial.subject])
            counts[trial.subject.kind, outcome] += 1
            worst["seconds"] = max(worst["seconds"], ended.seconds)
            worst["bytes"] = max(worst["bytes"], ended.peak)
            if problem:
                failures.append(f"{trial.name}: {problem}\n{_end(ended.err)}")
                print(failures[-1], flush=True)
            elif options.verbose:
                print(f"{trial.name}: {outcome}\n{_end(ended.err)}", flush=True)
    print(_table(counts))
    most = f"{worst['seconds']:.1f} s, {worst['bytes'] / 2**20:.0f} MiB more memory"
    print(f"At most {most}.")
    if options.json is not None:
        rows = [[*key, number] for key, number in sorted(counts.items())]
        options.json.write_text(json.dumps({"counts": rows, "failures": failures, **worst}))
    return int(bool(failures))


def _end(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "".join(f"    {line[:400]}\n" for line in lines[-6:])


def _table(counts: collections.Counter[tuple[str, str]]) -> str:
    outcomes = (REFUSED, SAME, ASKED, "")
    lines = [
        "| files | changes | refused | same result | as asked | wrong |",
        "|---|---|---|---|---|---|",
    ]
    kinds = sorted({kind for kind, _ in counts})
    for kind in (*kinds, None):
        own = [
            sum(
                number
                for (of, found), number in counts.items()
                if found == one and kind in (None, of)
            )
            for one in outcomes
        ]
        cells = " | ".join(f"{number}" for number in (sum(own), *own))
        lines.append(f"| {kind or 'all'} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

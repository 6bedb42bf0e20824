"""Files that were damaged, swapped or made to do harm: what the program makes of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.programs import ROOT, clean_environment
from tests.mutations.subjects import SUBJECTS
from tests.mutations.trial import ASKED, MOST_BYTES, MOST_SECONDS, REFUSED, SAME, trials

COUNT = 320


def test_the_list_is_the_same_each_time_and_has_every_kind() -> None:
    once, again = (
        [(one.subject.name, one.file, one.change, one.seed) for one in trials(SUBJECTS, COUNT, 0)]
        for _ in range(2)
    )
    assert once == again
    assert len(set(once)) == COUNT
    kinds = {one.subject.kind for one in trials(SUBJECTS, COUNT, 0)}
    wanted = {"config", "rows", "run", "export", "foreign export", "tokenizer", "samples"}
    assert kinds == wanted


def results(found: Path, *arguments: str) -> Any:
    # A process of its own, which each trial is a fork of: it has no threads, and no other tests'
    # memory.
    subprocess.run(
        [sys.executable, "-m", "tests.mutations", *arguments, "--json", str(found)],
        cwd=ROOT,
        env={**clean_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        check=False,
        timeout=580,
    )
    result = json.loads(found.read_text())
    assert result["failures"] == []
    assert result["bytes"] < MOST_BYTES
    assert result["seconds"] < MOST_SECONDS
    return result


@pytest.mark.slow
def test_every_change_is_refused_or_changes_no_result_or_asks_for_another(tmp_path: Path) -> None:
    result = results(tmp_path / "found.json", str(COUNT), "0")
    counts = dict.fromkeys((REFUSED, SAME, ASKED), 0)
    for _, outcome, number in result["counts"]:
        counts[outcome] += number
    assert sum(counts.values()) == COUNT
    # Neither refuses all, nor takes all.
    assert all(number >= 5 for number in counts.values()), counts


@pytest.mark.slow
def test_no_file_is_waited_for(tmp_path: Path) -> None:
    counts = results(tmp_path / "found.json", "--every", "pipe that nobody writes")["counts"]
    # What a command does without may be as it was.
    assert {outcome for _, outcome, _ in counts} == {REFUSED, SAME}

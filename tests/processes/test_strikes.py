"""Runs of two processes, struck: nothing stays, the status is true, the same command ends alike.

A few of each kind here; as many as one likes by `python -m tests.processes`.
"""

from pathlib import Path

import pytest

from tests.processes.strikes import (
    CLOSE,
    CONNECTING,
    EXPORTS,
    FIRST_STEP,
    KILL,
    LAUNCHER,
    RANK,
    READER,
    SAVE,
    STEPS,
    STOP,
    TERMINAL,
    Strike,
    Undisturbed,
    draw,
    strike,
    undisturbed,
)

SAMPLE = [
    Strike(KILL, LAUNCHER, SAVE, step=5, fraction=0.5, rank=0, real=True),
    Strike(KILL, RANK, STEPS, step=6, fraction=0.5, rank=0, real=False),
    Strike(STOP, LAUNCHER, CONNECTING, step=2, fraction=0.5, rank=0, real=False),
    Strike(STOP, READER, STEPS, step=7, fraction=0.5, rank=1, real=False),
    Strike(STOP, RANK, FIRST_STEP, step=2, fraction=0.5, rank=0, real=False),
    Strike(CLOSE, TERMINAL, STEPS, step=8, fraction=0.5, rank=0, real=False),
]


@pytest.fixture(scope="module")
def usual(prepared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return undisturbed(prepared_folder, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_run_that_is_struck_leaves_nothing_and_goes_on_alike(
    case: Strike, usual: Undisturbed, prepared_folder: Path, tmp_path: Path
) -> None:
    strike(case, prepared_folder, tmp_path / "struck", usual)


@pytest.mark.nightly
@pytest.mark.parametrize("case", draw(60, seed=0), ids=str)
def test_so_does_each_of_sixty(
    case: Strike, usual: Undisturbed, prepared_folder: Path, tmp_path: Path
) -> None:
    strike(case, prepared_folder, tmp_path / "struck", usual)


def test_each_deed_comes_at_each_moment() -> None:
    drawn = draw(62, seed=1)
    assert drawn == draw(62, seed=1)
    # Readers are there from the first step to the last.
    assert len({(case.deed, case.target, case.moment) for case in drawn}) == 7 * 5 - 2 * 2
    assert {case.moment for case in drawn if case.target == READER} == {FIRST_STEP, STEPS, SAVE}
    assert {case.real for case in drawn if case.moment == EXPORTS} == {True, False}

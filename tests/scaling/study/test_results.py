"""results.jsonl, there and back, and what is refused."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.settings import UserError
from cola_train.scaling.study.results import Result, Results
from cola_train.scaling.study.trials import TrialRun
from tests.scaling.study.specs import read, write_study

numbers = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[TrialRun]:
    return read(write_study(tmp_path_factory.mktemp("spec"), "data"))[1]


@given(values=st.dictionaries(st.text(max_size=5), numbers, max_size=3), cost=numbers)
def test_results_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[TrialRun],
    values: dict[str, float],
    cost: float,
) -> None:
    path, (run, other, *_) = tmp_path_factory.mktemp("study") / "results.jsonl", runs
    parts = ({"metrics": values}, {"s": cost}, {"a": {}}, {"a": {}})
    result = Result(run.trial, 66, run.made_of, *parts, None)
    Results(path).put(result)
    assert Results(path).of(run) == result
    assert Results(path).of(other) is None


def test_a_line_is_replaced_by_its_like_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    _, before = read(write_study(tmp_path, "data"))
    _, after = read(write_study(tmp_path, "data", settings=["data.path=d", "optim.beta1=0.5"]))
    results = Results(path)
    for run, value in ((before[0], 1.0), (after[0], 2.0), (before[0], 3.0)):
        figures = {"metrics": {"loss": value}}
        results.put(Result(run.trial, run.seed, run.made_of, figures, {}, {}, {}, None))
    again = Results(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["figures"]["metrics"]["loss"] for line in lines] == [3, 2]
    found = again.of(after[0])
    assert found is not None
    assert found.figures == {"metrics": {"loss": 2.0}}
    # The first trial in the file's order is `first`, the VAE.
    assert again.changes(before[0]) == [
        "data.path: d, now data",
        "optim.beta1: 0.5, now the default",
        "trainer.max_steps: 6, now 2",
    ]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"cost"', '"costs"', "line 1 is no result of a study: it must have trial, seed, made_of"),
        ('"seed": 66, "made_of"', '"seed": "x", "made_of"', "line 1: seed is 'x'"),
        ('"loss": 1.5', '"loss": "low"', "loss of metrics must be a number, not 'low'"),
        ("{", "", "is not JSON"),
    ],
)
def test_a_line_that_is_no_result_is_refused(
    tmp_path: Path, runs: list[TrialRun], old: str, new: str, message: str
) -> None:
    path, run = tmp_path / "results.jsonl", runs[0]
    figures = {"metrics": {"loss": 1.5}}
    Results(path).put(Result(run.trial, 66, run.made_of, figures, {}, {}, {}, None))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Results(path)

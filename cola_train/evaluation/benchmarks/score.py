"""The `score` verb: judge existing answers, ours or published, by the benchmarks' rules."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError, nearest, require
from cola_train.console import say
from cola_train.evaluation.benchmarks.answers import ANSWERS, Answer
from cola_train.evaluation.benchmarks.results import summarize, to_table, write_results
from cola_train.evaluation.benchmarks.tasks import TASKS, Sample, read_samples
from cola_train.files import atomic_folder, lfs_hint, read_errors_explained, require_new
from cola_train.json_text import parse_json


def score(path: Path, data: Path | None, out: Path | None) -> str:
    """Judge every record of a file or folder; returns the table.

    Ground truths and choices are taken from `data`, a folder of TASK.jsonl files, by id, if it is
    given; verdicts, summary and figure are written to `out`, a new folder.

    Raises:
        UserError: as of `read_answers`, or `out` exists.
    """
    require_new(out)
    answers = read_answers(path, data)
    if out is None:
        return to_table(summarize(answers), {})
    with atomic_folder(out) as working:
        return write_results(working, answers, {})


def read_answers(path: Path, data: Path | None = None) -> list[Answer]:
    """The records of a .jsonl file or of a folder's answers.jsonl, or else of its TASK.jsonl files.

    A record is an object with `generation`, or as published `generate` and `others`, which was cut
    off it with a line feed (null is an empty text, which is never correct); `ground_truth`, or else
    `answer`, unless `data` has it; `choices` where there are some; and `task`, or else the file's
    name is the task. With `scores` the option of the largest was chosen.

    Blank lines and lines that are not JSON are skipped, and their number is said. No record is left
    out because of its id.

    Raises:
        UserError: no such file, not UTF-8, nothing to score, a line that is no object, an unknown
            task, a field that is missing or of a wrong type, or an id not in `data`.
    """
    known: dict[str, dict[int | str, Sample]] = {}
    answers = []
    for file in _files(path):
        for number, record in _records(file):
            where = f"{file}, line {number}"
            answer = _answer(record, file.stem, number, where, needs_truth=data is None)
            if data is not None:
                if answer.task not in known:
                    samples = read_samples(data, answer.task)
                    known[answer.task] = {sample.id: sample for sample in samples}
                answer = _with_truth(answer, known[answer.task], data, where)
            answers.append(answer)
    require(
        bool(answers),
        f"{path} holds no answers; give an answers.jsonl, or files TASK.jsonl with `id`, "
        "`generation` and `ground_truth` in each line.",
    )
    return answers


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / ANSWERS).is_file():
        return [path / ANSWERS]
    found = [file for task in TASKS if (file := path / f"{task}.jsonl").is_file()]
    require(
        bool(found),
        f"{path} has neither {ANSWERS} nor a file named after a benchmark, such as "
        f"{TASKS[0]}.jsonl.",
    )
    return found


def _records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Each object in a file with its line number; says how many lines were skipped."""
    try:
        with read_errors_explained(file):
            text = read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.start}); convert it first."
        ) from None
    hint = lfs_hint(file)
    require(not hint, f"{file} holds no answers.{hint}")
    skipped = 0
    # Not splitlines: a JSON string may hold Unicode's line separators.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            record = parse_json(line)
        except ValueError:
            skipped += 1
            continue
        require(
            isinstance(record, dict),
            f'{file}, line {number} must be an object such as {{"id": 1, "generation": ...}}, not '
            f"{line[:40]!r}.",
        )
        yield number, record
    if skipped:
        say(f"{file}: {skipped} lines are blank or not JSON and were skipped.")


def _answer(
    record: Mapping[str, Any], file_task: str, number: int, where: str, *, needs_truth: bool
) -> Answer:
    def check(is_valid: bool, name: str, rule: str) -> None:
        require(is_valid, f"{where}: `{name}` must be {rule}, not {record.get(name)!r}.")

    def text(name: str) -> str | None:
        value: Any = record.get(name)
        check(value is None or isinstance(value, str), name, "a text")
        return value

    task, sample_id = record.get("task", file_task), record.get("id", number)
    require(
        task in TASKS,
        f"{where}: the task is '{task}' (field `task`, or the file's name); "
        f"{nearest(str(task), TASKS)}",
    )
    generation = text("generation")
    if generation is None:
        generation, others = text("generate") or "", text("others")
        generation += "" if others is None else f"\n{others}"
    truth = text("ground_truth")
    check(isinstance(sample_id, int | str), "id", "a whole number or a text")
    choices, scores = record.get("choices") or [], record.get("scores") or []
    are_texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    check(are_texts, "choices", "a list of texts")
    are_numbers = isinstance(scores, list) and all(
        type(one) in (int, float) and math.isfinite(one) for one in scores
    )
    check(are_numbers and len(scores) in (0, len(choices)), "scores", "a number for each choice")
    if truth is None:
        truth = text("answer") or ""
    lacking = []
    if not record.keys() & {"generation", "generate"}:
        lacking.append("`generation` (or `generate`)")
    if needs_truth and not record.keys() & {"ground_truth", "answer"}:
        lacking.append("`ground_truth` (or `answer`)")
    if not needs_truth and "id" not in record:
        lacking.append("`id`, which tells its sample in --data")
    fields = ", ".join(record) or "none"
    kind = "neither" if lacking[1:] else "no"
    require(not lacking, f"{where} has {kind} {' nor '.join(lacking)}; its fields are: {fields}.")
    # Nothing generated would be like it.
    require(
        not needs_truth or bool(truth.strip()),
        f"{where}: `ground_truth` (or `answer`) must be a text that is not empty, not {truth!r}.",
    )
    return Answer(task, sample_id, generation, truth, tuple(choices), tuple(scores))


def _with_truth(
    answer: Answer, samples: Mapping[int | str, Sample], data: Path, where: str
) -> Answer:
    sample = samples.get(answer.id)
    if sample is None:
        raise UserError(
            f"{where}: {data / f'{answer.task}.jsonl'} has no sample with the id {answer.id!r}; "
            "give the data that was answered, or leave out --data."
        )
    require(
        not answer.scores or answer.choices == sample.choices,
        f"{where}: the scores are of other choices than those in {data}.",
    )
    return dataclasses.replace(answer, ground_truth=sample.ground_truth, choices=sample.choices)

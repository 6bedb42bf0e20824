"""The eight benchmarks of the released evaluation, and the one layout of their samples.

A benchmark is a file FOLDER/TASK.jsonl in UTF-8: a JSON object a line, with these fields.

    id            whole number or string, unique in the file; it names the answer and addresses the
                  noise that the answer is drawn with
    question      string: what `prompts.build_prompt` shows. lambada: the passage without its last
                  word and the space before that; race: article, one space, question; story_cloze:
                  the story so far
    ground_truth  string: the answer; where there are choices, exactly one of them
    choices       list of at most 26 strings, (A) first: mmlu, obqa, hellaswag, race, siqa,
                  story_cloze (two)
    context       string: squad's paragraph

Fields are shown as they are, with their spaces and line breaks. Other fields and empty lines are
ignored.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.content import read_bytes
from cola_train.config.evaluation import BENCHMARKS
from cola_train.config.settings import UserError, nearest, require
from cola_train.files import file_hint, lfs_hint, read_errors_explained
from cola_train.json_text import parse_json

# The released model's (correct answers, samples), by the released scorer.
RELEASED = {
    "lambada": (508, 1000),
    "mmlu": (193, 1000),
    "obqa": (115, 500),
    "hellaswag": (107, 1000),
    "race": (196, 1000),
    "siqa": (289, 1000),
    "squad": (309, 1000),
    "story_cloze": (144, 468),
}
RELEASED_ACCURACY = {task: 100 * correct / total for task, (correct, total) in RELEASED.items()}
TASKS = BENCHMARKS
TASKS_WITH_CHOICES = ("mmlu", "obqa", "hellaswag", "race", "siqa", "story_cloze")
MOST_CHOICES = 26  # each has a letter
_HOW_TO_GET = "Make the files by: cola-train evaluate --fetch"


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of a benchmark, with the fields that the module's docstring describes."""

    id: int | str
    question: str
    ground_truth: str
    choices: tuple[str, ...] = ()
    context: str = ""

    def to_json(self) -> dict[str, Any]:
        """A line of the file: `choices` and `context` only where there are some."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value or name not in ("choices", "context")
        }


def check_task(task: str) -> None:
    """Refuse a name that is none of `TASKS` by a UserError with the nearest one."""
    require(task in TASKS, f"There is no benchmark '{task}'; {nearest(task, TASKS)}")


def read_samples(folder: Path, task: str) -> list[Sample]:
    """The samples of FOLDER/TASK.jsonl, in order.

    Raises:
        UserError: an unknown task, no such file, or what is wrong in it, with the line.
    """
    check_task(task)
    path = folder / f"{task}.jsonl"
    return parse_samples(task, _text(path), str(path))


def parse_samples(task: str, text: str, name: str) -> list[Sample]:
    """The samples of a file's text; `name` is what messages call the file.

    Raises:
        UserError: what is wrong in it, with the line, or no sample.
    """
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    # Not splitlines: a text may hold Unicode's line separators.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        sample = _sample(task, _row(line, place), place)
        first = lines.setdefault(str(sample.id), number)
        require(
            first == number,
            f"{place} has the id {sample.id!r} of line {first}; every sample needs its own id.",
        )
        samples.append(sample)
    require(bool(samples), f"{name} has no sample. {_HOW_TO_GET}")
    return samples


def _text(path: Path) -> str:
    if not path.is_file():
        holds = f"there is no folder {path.parent}{file_hint(path.parent)}"
        if path.parent.is_dir():
            names = sorted(found.name for found in path.parent.glob("*.jsonl"))
            holds = f"{path.parent} holds {', '.join(names) or 'no .jsonl file'}"
            if there := ",".join(task for task in TASKS if f"{task}.jsonl" in names):
                holds += (
                    f"; choose by --tasks {there} what is there (of a run: in_loop_eval.tasks="
                    f"[{there}])"
                )
        raise UserError(f"There is no file {path}: {holds}. {_HOW_TO_GET}")
    try:
        with read_errors_explained(path):
            text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line} is not valid UTF-8 ({error.reason}); convert the file to UTF-8."
        ) from None
    hint = lfs_hint(path)
    require(not hint, f"{path} holds no samples.{hint}")
    return text


def _row(line: str, place: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = parse_json(line)
    except ValueError as error:
        raise UserError(
            f"{place} is not valid JSON ({error}); every line must be one JSON object."
        ) from None
    require(isinstance(row, dict), f"{place} must be one JSON object, not a {type(row).__name__}.")
    return row


def _sample(task: str, row: Mapping[str, Any], place: str) -> Sample:
    def field(name: str, rule: str, is_valid: Callable[[Any], bool], allowed: str = "") -> Any:
        """The value of a field; a UserError names the rule that it breaks, and what is there."""
        value = row.get(name)
        found = f"not {value!r:.80}"
        if name not in row:
            found = f"and there is none (the fields are: {', '.join(row) or 'none'})"
        require(is_valid(value), f"{place}: '{name}' must be {rule}, {found}{allowed}.")
        try:
            for text in value if isinstance(value, list) else [value]:
                str(text).encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(
                f"{place}: '{name}' has a lone surrogate, which is no Unicode text; repair the "
                "sample."
            ) from None
        return value

    sample_id = field("id", "a whole number or a string", _is_id)
    choices: tuple[str, ...] = ()
    if task in TASKS_WITH_CHOICES:
        choices = tuple(field("choices", f"a list of strings in {task}", _is_list_of_strings))
        count = len(choices)
        if task == "story_cloze":
            require(count == 2, f"{place}: story_cloze has 2 choices, not {count}.")
        require(
            2 <= count <= MOST_CHOICES,
            f"{place}: there must be 2 to {MOST_CHOICES} choices, not {count}.",
        )
        rule, allowed = "one of the choices to the letter", ", ".join(map(repr, choices))
        truth = field("ground_truth", rule, choices.__contains__, f"; allowed: {allowed}")
    else:
        truth = field("ground_truth", "a text", _is_text)
    context = field("context", "a text", _is_text) if task == "squad" else ""
    return Sample(sample_id, field("question", "a text", _is_text), truth, choices, context)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool) and value != ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)

"""A folder of answers: what was asked of whom, and each answer, written once. All else in the
folder follows from these.

evaluation.json    what was asked: checkpoint, tokenizer, settings, data; another evaluation is
                   refused here
parts/N.jsonl      answers in the order they came, those of process N; only ever appended to
answers.jsonl      the answers of whole tasks, in order; like verdicts.jsonl and the summary made
                   anew each time
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_train.config.settings import UserError, require
from cola_train.evaluation.benchmarks.tasks import TASKS
from cola_train.files import JsonlWriter, read_log, write_atomically

IDENTITY, ANSWERS = "evaluation.json", "answers.jsonl"
_PARTS = "parts"
_DATA = "data"
Key = tuple[str, int | str]  # task, and the sample's id


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered to one sample.

    Attributes:
        prompt_sha256: of the prompt's UTF-8 bytes, in hexadecimal.
        generation: the text of all tokens that were decoded, special ones included; or the text of
            the option that was chosen.
        scores: of each choice, log P in nats (or nats per token), where the option was chosen by
            likelihood: the largest is it.
    """

    task: str
    id: int | str
    generation: str
    ground_truth: str
    choices: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    prompt_sha256: str = ""

    @property
    def key(self) -> Key:
        """What names the sample."""
        return self.task, self.id

    @property
    def chosen(self) -> int | None:
        """The choice of the largest score, the first of several; None of a generated answer."""
        return self.scores.index(max(self.scores)) if self.scores else None

    def to_json(self) -> dict[str, Any]:
        """A line of answers.jsonl: `choices` and `scores` only where there are some."""
        row: dict[str, Any] = {
            "task": self.task,
            "id": self.id,
            "prompt_sha256": self.prompt_sha256,
        }
        row |= {"generation": self.generation, "ground_truth": self.ground_truth}
        row |= {"choices": list(self.choices)} if self.choices else {}
        return row | ({"scores": list(self.scores)} if self.scores else {})

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Answer":
        """What `to_json` gave."""
        lists = {name: tuple(row.get(name, ())) for name in ("choices", "scores")}
        return cls(
            row["task"],
            row["id"],
            row["generation"],
            row["ground_truth"],
            prompt_sha256=row["prompt_sha256"],
            **lists,
        )


def to_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class AnswerFolder:
    """The answers of one evaluation. It may grow by tasks; nothing that was answered is answered
    again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any]) -> "AnswerFolder":
        """Make the folder, or go on with it.

        Args:
            path: the folder; an empty one is one that is not there.
            identity: anything of JSON that decides the answers, and under `data` for each task its
                `sha256` and `num_samples`.

        Raises:
            UserError: something else is there, or the answers of another identity; all keys that
                differ are named.
        """
        # as it will be read: without tuples
        here: dict[str, Any] = json.loads(json.dumps(identity))
        there = cls(path)._read_identity()
        if there:
            common = there[_DATA].keys() & here[_DATA].keys()
            different = _differences(
                *(
                    {**each, _DATA: {task: each[_DATA][task] for task in common}}
                    for each in (there, here)
                )
            )
            require(
                not different,
                f"{path} holds the answers of another evaluation, which are kept. It differs in: "
                f"{'; '.join(different)}. Give another folder by --out.",
            )
            here[_DATA] = {**there[_DATA], **here[_DATA]}
        if there != here:
            write_atomically(path / IDENTITY, json.dumps(here, indent=1, ensure_ascii=False) + "\n")
        return cls(path)

    def _read_identity(self) -> dict[str, Any]:
        path = self.path / IDENTITY
        if not self.path.exists():
            return {}
        require(self.path.is_dir(), f"{self.path} is a file and is kept; give a folder by --out.")
        if not path.is_file():
            # What begins with a dot is what a crash left of writing the first file.
            require(
                all(found.name.startswith(".") for found in self.path.iterdir()),
                f"{self.path} holds something else than answers (it has no {IDENTITY}); give "
                "another --out.",
            )
            return {}
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"Cannot read {path} ({error}); put it back, or give another folder by --out."
            ) from error
        return found

    def append_to(self, part: int) -> JsonlWriter:
        """Where process `part` appends its answers, each as `part_row`."""
        folder = self.path / _PARTS
        folder.mkdir(exist_ok=True)
        return JsonlWriter(folder / f"{part}.jsonl")

    def keys(self) -> set[Key]:
        """Which samples have an answer."""
        return {Answer.from_json(row).key for row in self._rows()}

    def answers(self) -> tuple[list[Answer], dict[str, str]]:
        """The answers of all tasks that are whole, by task and place; and of each other task how
        many of how many there are.
        """
        asked = self._read_identity()[_DATA]
        found: dict[str, dict[Key, tuple[int, Answer]]] = {task: {} for task in asked}
        for row in self._rows():
            answer = Answer.from_json(row)
            # Two that ran at once may both have answered.
            found[answer.task].setdefault(answer.key, (row["place"], answer))
        whole, rest = [], {}
        for task in sorted(found, key=TASKS.index):
            if len(found[task]) == asked[task]["num_samples"]:
                whole += [
                    answer
                    for _, answer in sorted(found[task].values(), key=lambda placed: placed[0])
                ]
            else:
                rest[task] = f"{len(found[task])} of {asked[task]['num_samples']}"
        return whole, rest

    def _rows(self) -> Iterator[dict[str, Any]]:
        for path in sorted((self.path / _PARTS).glob("*.jsonl")):
            yield from read_log(path)


def part_row(answer: Answer, place: int) -> dict[str, Any]:
    """A line of a part: the answer, and the place of its sample in the task."""
    return {"place": place, **answer.to_json()}


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    before, now = dict(_flat(there)), dict(_flat(here))
    return [
        f"{key} ({before.get(key)} there, {now.get(key)} here)"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

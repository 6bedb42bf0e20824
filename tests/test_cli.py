"""The command line: help that reads well, errors without tracebacks, imports that wait."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cola_train.cli import _ended, _versions, main
from tests.helpers.programs import ROOT

VERBS = [
    "tokenizer",
    "tokenizer train",
    "tokenizer olmo2",
    "prepare",
    "vae",
    "joint",
    "ar",
    "llada",
    "branch",
    "plan",
    "match",
    "compare",
    "curve",
    "curve run",
    "curve fit",
    "curve plot",
    "study",
    "study run",
    "study table",
    "export",
    "sample",
    "verify",
    "warm-start",
    "audit",
    "chaos",
    "doctor",
    "runs",
]


def run(*arguments: str) -> int:
    try:
        return main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*verb.split(), "--help") == 0
    out = capsys.readouterr().out
    assert f"usage: cola-train {verb}" in out
    assert len(out.splitlines()) > 4


def test_the_top_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert all(verb.split()[0] in out for verb in VERBS)


def test_a_verbs_help_lists_settings_with_meaning_and_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("joint", "--help", "all") == 0
    out = capsys.readouterr().out
    assert (
        "  objective.flow.time_loc\n      Mean of the normal under the sigmoid. [1.0; a finite"
        in out
    )
    assert "  name\n      The run's name: its folder under runs_folder. [required]" in out


def test_flags_that_texts_name_are_those_of_their_verb(capsys: pytest.CaptureFixture[str]) -> None:
    """In the program's messages and help."""
    texts = "".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "cola_train").rglob("*.py")
    )
    named = set(re.findall(r"cola-train ([a-z-]+) (--[a-z-]+)", texts))
    assert ("sample", "--prompts") in named
    for verb, flag in named:
        assert run(verb, "--help") == 0
        assert re.search(rf"{flag}\b(?!-)", capsys.readouterr().out), (
            f"cola-train {verb} has no {flag}"
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["vae", "name=x", "data.path=nowhere", "vae.block_size=1"],
            "cola-train: error: There is no prepared data folder nowhere",
        ),
        (["vae", "trainer.max_step=3"], "cola-train: error: Unknown config key 'trainer.max_step'"),
        (
            ["vae", "configs/none.yaml"],
            "cola-train: error: There is no config file configs/none.yaml",
        ),
        (
            ["sample", "nowhere", "--prompt", "x"],
            "cola-train: error: nowhere does not exist, so it holds no checkpoint of any",
        ),
        (["sample", "nowhere"], "cola-train: error: Give either --prompt TEXT"),
        (["export", "nowhere"], "cola-train: error: nowhere is not a run folder"),
        (["vae", "--resume", "nowhere"], "cola-train: error: nowhere is not a run folder"),
        (
            ["tokenizer", "train", "out=x.json"],
            "cola-train: error: Give exactly one of corpus.inputs",
        ),
        (
            ["sample", "nowhere", "--prompt", "x", "top_p=2"],
            r"cola-train: error: top_p must be in (0, 1], not 2",
        ),
        (
            ["plan", "configs/none.yaml"],
            "cola-train: error: There is no config file configs/none.yaml",
        ),
        (["curve", "fit"], "cola-train: error: Give the curve's spec"),
        (["curve", "run", "none.yaml", "--parallel", "0"], "--parallel must be at least 1, not 0"),
        (["curve", "run", "none.yaml"], "cola-train: error: There is no config file none.yaml"),
        (["study", "table", "seeds=[1]"], "cola-train: error: Give the study's spec, for example"),
        (["study", "run", "none.yaml", "--parallel", "0"], "--parallel must be at least 1, not 0"),
        (
            ["compare", "nowhere"],
            "cola-train: error: nowhere is not a run folder: it has no config.yaml",
        ),
        (["branch", "nowhere", "name=x"], "cola-train: error: nowhere is not a run folder"),
        (
            ["ar", "name=x", "data.path=x", "budget.eflops=-1"],
            "cola-train: error: budget.eflops must be above 0 or null, not -1.0",
        ),
        (["prepare", "--fast"], "cola-train: error: unrecognized arguments: --fast"),
        (
            ["vae", "--trainer.max_steps=5"],
            "--trainer.max_steps=5; settings are key=value, without --: trainer.max_steps=5",
        ),
        (
            ["plan", "x.yaml", "--seed.x", "5"],
            "; settings are key=value, without --: seed.x=VALUE",
        ),
        (["vae", "--name", "x"], "; settings are key=value, without --: name=VALUE"),
        (["export", "nowhere", "--max-shard-gb", "nan"], "--max-shard-gb must be above 0, not nan"),
        (["export", "nowhere", "extra=1"], "cola-train: error: unrecognized arguments: extra=1"),
    ],
)
def test_a_mistake_gets_a_message_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_exists_is_a_path_whatever_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "lr=3e-4").mkdir(parents=True)
    assert run("evaluate", "runs/lr=3e-4", "num_samples=0", "--data", "nowhere") == 2
    assert "num_samples must be at least 1" in capsys.readouterr().err
    (tmp_path / "lr=3.yaml").write_text("nmae: x")
    assert run("vae", "lr=3.yaml", f"name={'x' * 300}") == 2
    assert "Unknown config key 'nmae' in lr=3.yaml" in capsys.readouterr().err


def test_a_wrong_config_is_refused_before_torch_is_imported() -> None:
    script = (
        "import sys\n"
        "from cola_train.cli import main\n"
        "status = main(['joint', 'dit.layers=3'])\n"
        "sys.exit(10 + status if 'torch' not in sys.modules else 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 12, done.stderr
    assert "Unknown config key 'dit.layers'" in done.stderr


# Each of these takes a second or so of every process that imports it.
_HEAVY = {
    "lightning",
    "torchmetrics",
    "transformers",
    "torchao",
    "matplotlib",
    "scipy",
    "torchdiffeq",
    "wandb",
    "datasets",
    "pyarrow",
    "pandas",
    "torch._dynamo",
    "torch._inductor",
}
_DRAWS = {"evaluation.benchmarks.evaluate"}


_VERBS = [
    "training.run",
    "training.branch",
    "scaling.curve",
    "scaling.study.run",
    "operations.chaos",
    "data.prepare",
    "evaluation.writing.sample",
    "evaluation.writing.verify",
    "evaluation.likelihood.perplexity",
    "evaluation.inspect",
    "bench.data",
    *sorted(_DRAWS),
]
# torch is imported once; then each module in a fork that has nothing else.
_IMPORT_EACH = """
import importlib, os, sys, torch
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(name)
        print(name, *sys.modules, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """The modules that are there once a module has been imported, by its name."""
    command = [sys.executable, "-c", _IMPORT_EACH, *(f"cola_train.{name}" for name in _VERBS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {line.split()[0]: {*line.split()[1:]} for line in done.stdout.splitlines()}


@pytest.mark.parametrize("module", _VERBS)
def test_what_a_verb_imports_first_is_nothing_that_only_some_of_its_uses_need(
    module: str, imported: dict[str, set[str]]
) -> None:
    """Lightning, above all: only what trains needs it, and not before it is known that it will."""
    found = imported[f"cola_train.{module}"]
    assert f"cola_train.{module}" in found
    assert _HEAVY & found == ({"matplotlib"} if module in _DRAWS else set())


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cola_train", "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: cola-train" in done.stdout


def test_a_run_of_another_version_is_refused_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(
        "stage: vae\nguard: {spike_sigmas: 6}\n", encoding="utf-8"
    )
    assert run("export", str(tmp_path)) == 2
    message = capsys.readouterr().err
    assert "Unknown config key 'guard.spike_sigmas'" in message
    assert "If another version of cola-train wrote it, go on with that version" in message


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(5, "Input/output error", "a.bin"), r"Input/output error \(a\.bin\)\. What was"),
        (OSError(28, "No space left on device"), r"error: No space left on device\. What was"),
        (MemoryError(), "error: There is not enough memory"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ended(error, monkeypatch) == 1
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


def test_a_defect_of_ours_says_where_it_is_and_where_to_report_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(KeyError("lost"), monkeypatch) == 1
    said = capsys.readouterr().err
    assert "in _ended\n" in said
    assert f"KeyError: 'lost'\ncola-train: error: This is a defect of {_versions()[:5]}" in said
    assert f"{_versions()}, Python {sys.version.split()[0]}) where you got cola-train" in said


def ended(error: Exception, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail() -> int:
        raise error

    monkeypatch.setattr("cola_train.cli.main", fail)
    return _ended()


@pytest.mark.parametrize("arguments", [["vae", "--help", "all"], ["--version"]])
def test_a_reader_that_has_enough_ends_a_verb_without_a_word(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cola_train", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")

"""The commands whose file operations are struck, as small as they come; and what each leaves."""

import dataclasses
import json
import lzma
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from cola_train.json_lines import read_log
from cola_train.run_folder import read_status
from cola_train.run_layout import LOGS, METRICS, STATUS, STEP_LOG
from tests.faults.server import Server
from tests.helpers.benchmarks import make_samples, reader, write_samples
from tests.helpers.runs import BOOK, SMALL, SMALL_DIT, figures, saved_tensors

Result = Mapping[str, object]

_RUN = [
    *SMALL,
    "data.path=rows",
    "name=run",
    "trainer.max_steps=3",
    "checkpoint.every_steps=2",
    "trainer.validate_every_steps=2",
]
_JOINT = [*_RUN, *SMALL_DIT, "objective.reference_weight=0"]
_SAMPLER = {"num_steps": 2, "max_new_tokens": 4, "batch_size": 1}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A command and what it takes.

    Attributes:
        verb: as it is called in the table.
        arguments: of `cola-train`, in a folder of its own.
        inputs: what lies there before, of what `make_inputs` makes.
        result: all that an unharmed command decides to the bit; no times.
        may_exist: whether a result that is there already is refused by name.
    """

    verb: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    result: Callable[[Path], Result]
    may_exist: bool = False


def _files(*places: str) -> Callable[[Path], Result]:
    """The bytes of files, and of all files in folders."""

    def read(folder: Path) -> Result:
        found = {}
        for place in places:
            path = folder / place
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file():
                    found[str(file.relative_to(folder))] = file.read_bytes()
        return found

    return read


def _run(folder: Path) -> Result:
    """Weights, moments, exported weights, every logged figure, and the samples of each step."""
    run = folder / "checkpoints" / "run"
    steps = {row["step"]: row["digest"] for row in read_log(run / STEP_LOG) if "digest" in row}
    logged = {row["step"] for row in read_log(run / METRICS)}
    tensors = {name: value.numpy().tobytes() for name, value in saved_tensors(run).items()}
    exported = _files("checkpoints/run/hf")(folder)
    summary = json.loads((run / "summary.json").read_text())
    kept = {name: summary[name] for name in ("steps", "tokens")}
    status = read_status(run)
    return {
        **tensors,
        **exported,
        **{f"{name} of step {step}": value for (step, name), value in figures(run).items()},
        "steps": steps,
        "logged": logged,
        "summary": kept,
        "status": (status, (run / STATUS).is_file()),
    }


SCENARIOS = {
    scenario.verb: scenario
    for scenario in (
        Scenario(
            "tokenizer train",
            ("tokenizer", "train", "out=own.json", "corpus.inputs=[texts]", "vocab_size=320"),
            ("texts",),
            _files("own.json"),
            may_exist=True,
        ),
        Scenario(
            "prepare",
            (
                "prepare",
                "out=own",
                "tokenizer=tokenizer.json",
                "corpus.inputs=[texts]",
                "seq_len=32",
                "held_out_share=0.2",
            ),
            ("texts", "tokenizer.json"),
            _files("own"),
            may_exist=True,
        ),
        Scenario("vae", ("vae", *_RUN), ("rows",), _run),
        Scenario("joint", ("joint", *_JOINT), ("rows",), _run),
        Scenario(
            "joint, 2 processes",
            ("joint", *_JOINT, "parallel.num_processes=2", "trainer.micro_batch_size=2"),
            ("rows",),
            _run,
        ),
        Scenario("export", ("export", "checkpoints/run"), ("checkpoints",), _files("checkpoints")),
        Scenario(
            "export --out",
            ("export", "checkpoints/run", "--out", "own"),
            ("checkpoints",),
            _files("checkpoints", "own"),
            may_exist=True,
        ),
        Scenario(
            "sample --out",
            (
                *("sample", "reader", "--prompts", "prompts.jsonl", "--out", "own.jsonl"),
                *("--device", "cpu"),
                *(f"{name}={value}" for name, value in _SAMPLER.items()),
            ),
            ("reader", "prompts.jsonl"),
            _files("own.jsonl", "own.jsonl.settings.json"),
        ),
        Scenario(
            "evaluate",
            (
                *("evaluate", "reader", "--data", "benchmarks", "--tasks", "lambada,obqa"),
                *("--out", "own", "--device", "cpu"),
                *(f"sampler.{name}={value}" for name, value in _SAMPLER.items()),
            ),
            ("reader", "benchmarks"),
            _files(
                *(f"own/{name}" for name in ("answers.jsonl", "verdicts.jsonl", "evaluation.json")),
                "own/accuracy_summary.csv",
            ),
        ),
    )
}


def make_inputs(server: Server, folder: Path) -> None:
    """Everything that a scenario's `inputs` name, made by the commands themselves."""
    (folder / "texts").mkdir(parents=True)
    text = lzma.decompress(BOOK.read_bytes())[:12_000].rsplit(b"\n", 1)[0]
    (folder / "texts" / "book.txt").write_bytes(text)
    reader("cola").save(folder / "reader")
    for task, count in (("lambada", 3), ("obqa", 2)):
        write_samples(folder / "benchmarks", task, make_samples(task, count))
    prompts = [{"prompt": "It is"}, {"prompt": "She"}, {"input_ids": [70, 71]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    for verb, made, name in (
        ("tokenizer train", "own.json", "tokenizer.json"),
        ("prepare", "own", "rows"),
        ("joint", "checkpoints", "checkpoints"),
    ):
        ended = server.run(SCENARIOS[verb].arguments, folder)
        if ended.status:
            raise RuntimeError(f"{verb}: {ended.said}")
        (folder / made).rename(folder / name)


def workspace(scenario: Scenario, inputs: Path, folder: Path) -> None:
    """Make `folder`, with copies of what the command needs."""
    folder.mkdir(parents=True)
    for name in scenario.inputs:
        source = inputs / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        else:
            shutil.copy2(source, folder / name)


def names(folder: Path) -> set[str]:
    """All that lies below, hidden or not, but a launcher's logs, whose names are times."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in found if f"/{LOGS}/" not in f"/{name}"}

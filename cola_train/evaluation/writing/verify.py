"""The `verify` verb: how many texts of a generated language are valid, by its exact judge.

Written from nothing, and as completions of the beginnings of held-out documents, from the same
checkpoint by the same sampler. A prior that writes valid texts and does not complete them has
learned the language and not to heed a prompt.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_train.bootstrap import Interval
from cola_train.config.settings import require
from cola_train.data.generated.corpus import LANGUAGES
from cola_train.data.generated.language import Language
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.devices import named_device
from cola_train.evaluation.resuming import ResultFile, digest
from cola_train.evaluation.writing.config import VerificationConfig
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import GenerationResult, generate_stream
from cola_train.families.registry import load_checkpoint

_NOTHING, _COMPLETION = "from nothing", "as a completion"
_INSIDE, _BETWEEN = "prompt ends inside a block", "prompt ends with a block"
_FOUND = ("text", "fault")
_Z95 = 1.959963984540054  # the normal distribution's 97.5 % point
_HELP = (
    "prepare it with corpus.generated.kind, and seq_len and document_alignment one more than "
    "corpus.generated.most_bytes (docs/conditioning.md)."
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A text to write.

    Attributes:
        start: "from nothing" or "as a completion".
        number: among those of the same start, from 0.
        prompt: the ids it begins with; none from nothing.
    """

    start: str
    number: int
    prompt: tuple[int, ...]

    def record(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The task in a line of results."""
        prompt = tokenizer.decode(self.prompt)
        return {"start": self.start, "number": self.number, "prompt": prompt}


def wilson(successes: int, trials: int) -> Interval:
    """The 95 % score interval of a share (Wilson 1927), which is not empty at 0 and 1.

    `trials` is at least 1.
    """
    share, square = successes / trials, _Z95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    spread = share * (1 - share) / trials + square / (4 * trials**2)
    half = _Z95 * math.sqrt(spread) / (1 + square / trials)
    # At 0 and 1 rounding may leave the end a little inside or outside.
    low = 0.0 if successes == 0 else middle - half
    return Interval(low, 1.0 if successes == trials else middle + half)


def tasks_of(data: PreparedData, config: VerificationConfig) -> list[Task]:
    """The texts to write: one from nothing for each held-out document to complete, in turn."""
    eos, pad = data.manifest.eos_token_id, data.manifest.pad_token_id
    tasks = []
    for number in range(min(config.num_texts, data.num_rows(VALIDATION))):
        row = data.row(VALIDATION, number)[0].tolist()
        ids = [token for token in row if token not in (eos, pad)]
        prompt = tuple(ids[: max(1, int(config.prompt_share * len(ids)))])
        tasks += [Task(_NOTHING, number, ()), Task(_COMPLETION, number, prompt)]
    return tasks


def judged(
    language: Language, tokenizer: Tokenizer, result: GenerationResult
) -> tuple[str, str | None]:
    """A whole text with its prompt, and why it is not valid (None: it is)."""
    # Special tokens inside it are part of it, and of no language.
    ids = [*result.prompt_ids, *result.token_ids]
    text = tokenizer.decode(ids, special_tokens=True)
    ends = result.finish_reason == "stop"
    return text, language.fault(text) if ends else "does not end within its row"


def verify(
    checkpoint_folder: Path,
    data_folder: Path,
    out: Path | None,
    device: str,
    config: VerificationConfig,
) -> str:
    """Write texts with a checkpoint of any family, judge them, and return the table.

    `out` gets a JSON line a text, as soon as it is known; the same call goes on with one that it
    did not finish.

    Raises:
        UserError: no such checkpoint, data that was not generated, of another tokenizer or without
            held-out rows or with rows that are not a document each; `out` holds something else; as
            of `generate`.
    """
    data = PreparedData.open(data_folder)
    language = _language(data)
    results = None if out is None else ResultFile(out, _FOUND)
    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    require(
        data.manifest.tokenizer_sha256 == checkpoint.tokenizer.sha256,
        f"The data in {data_folder} has another tokenizer than {checkpoint_folder}; give data "
        "that was prepared with the checkpoint's own.",
    )
    tasks = tasks_of(data, config)
    records = [task.record(checkpoint.tokenizer) for task in tasks]
    done: set[int] = set()
    if results is not None:
        done = results.begin(_identity(checkpoint, data, config, records), records)
    found: dict[int, str | None] = {}
    left = {place: task for place, task in enumerate(tasks) if place not in done}
    written = _written(checkpoint, data.manifest.seq_len, left, config)
    for place, result in tqdm(written, "verifying", len(left), unit="text", disable=None):
        text, found[place] = judged(language, checkpoint.tokenizer, result)
        if results is not None:
            results.append(records[place], {"text": text, "fault": found[place]})
    faults: list[str | None] = [found[place] for place in sorted(found)]
    if results is not None:
        faults = [row["fault"] for row in results.finish()]
    title = f"{checkpoint_folder}, {data_folder} ({data.manifest.sources[0].name})"
    inside = [ends_inside_a_block(checkpoint, len(task.prompt)) for task in tasks]
    return f"{title}\n{table([task.start for task in tasks], inside, faults, config)}"


def ends_inside_a_block(checkpoint: Checkpoint, prompt_tokens: int) -> bool:
    """Whether the first pass after a prompt has less to write than others: it opens a block."""
    first, each = checkpoint.tokens_a_pass(prompt_tokens, 1)
    return first < each


def table(
    starts: Sequence[str],
    inside: Sequence[bool],
    faults: Sequence[str | None],
    config: VerificationConfig,
) -> str:
    """The lines that people read: of each start how many are valid, and what the others are.

    `inside` says of each text whether its prompt ends inside a block; where some do and others do
    not, completions have a line for either.
    """
    rows = list(zip(starts, inside, faults, strict=True))
    lines = []
    for start in (_NOTHING, _COMPLETION):
        own = [(opens, fault) for at, opens, fault in rows if at == start]
        name = f"{start} (share {config.prompt_share:g})" if start == _COMPLETION else start
        lines.append(_share_line(name, [fault for _, fault in own]))
        counts = Counter(fault for _, fault in own if fault is not None)
        lines += [f"  {'':30} {count:>7,} {fault}" for fault, count in counts.most_common()]
        parts = {
            name: [fault for opens, fault in own if opens == where]
            for name, where in ((_INSIDE, True), (_BETWEEN, False))
        }
        if all(parts.values()):
            lines += [_share_line(f"  {name}", part) for name, part in parts.items()]
    return "\n".join(lines) + "\n"


def _share_line(name: str, faults: Sequence[str | None]) -> str:
    valid = faults.count(None)
    low, high = wilson(valid, len(faults))
    return (
        f"  {name:30} {valid:>7,} of {len(faults):,} are valid: {valid / len(faults):.3f} "
        f"(95 %: {low:.3f} to {high:.3f})"
    )


def _language(data: PreparedData) -> Language:
    """The language of generated data whose rows are a document each."""
    generated = data.manifest.generated
    require(
        generated is not None,
        f"{data.folder} is not of a generated language, so nothing says what is valid; {_HELP}",
    )
    require(
        data.num_rows(VALIDATION) > 0,
        f"{data.folder} has no held-out rows; prepare it with held_out_share above 0.",
    )
    require(
        all(each.num_rows == each.num_documents for each in data.manifest.splits.values())
        and data.manifest.document_alignment == data.manifest.seq_len,
        f"In {data.folder} a row is not a document each, so that a text from nothing need not be a "
        f"whole one; {_HELP}",
    )
    kind = (generated or {}).get("kind")
    require(
        kind in LANGUAGES,
        f"{data.folder} is of a language that is not known here, {kind}; the known ones are "
        f"{', '.join(LANGUAGES)}.",
    )
    return LANGUAGES[str(kind)]


def _written(
    checkpoint: Checkpoint, seq_len: int, tasks: Mapping[int, Task], config: VerificationConfig
) -> Iterator[tuple[int, GenerationResult]]:
    """What was written of each task, with its place; those with prompts of a length together."""
    by_length: dict[int, list[int]] = {}
    for place, task in tasks.items():
        by_length.setdefault(len(task.prompt), []).append(place)
    for length, places in sorted(by_length.items()):
        # All that a row has left, and no more: masked diffusion begins with so many masks.
        sampler = dataclasses.replace(
            config.sampler,
            max_new_tokens=seq_len - length,
            eos_token_ids=(checkpoint.tokenizer.eos_token_id,),
        )
        prompts = [tasks[place].prompt for place in places]
        results = generate_stream(checkpoint, prompts, sampler, prompt_indices=places)
        yield from zip(places, results, strict=True)


def _identity(
    checkpoint: Checkpoint,
    data: PreparedData,
    config: VerificationConfig,
    records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """All that decides the results; the batch size does not, so that it may be lowered."""
    settings = dataclasses.asdict(config)
    for name in ("batch_size", "max_new_tokens", "eos_token_ids"):
        del settings["sampler"][name]
    texts = {"count": len(records), "sha256": digest(records)}
    own = {"generated": data.manifest.generated, "seq_len": data.manifest.seq_len, "texts": texts}
    return {**checkpoint.identity(), "verification": settings, **own}

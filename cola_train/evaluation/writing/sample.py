"""The `sample` verb: prompts from the command line or a file, results to the screen or a file."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import require
from cola_train.console import say
from cola_train.devices import named_device
from cola_train.evaluation.resuming import ResultFile, digest
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.generate import GenerationResult, generate_stream
from cola_train.families.registry import load_checkpoint
from cola_train.json_lines import read_jsonl
from cola_train.sampling.stream import check_ids

Prompt = str | list[int]
_FOUND = ("text", "token_ids", "prompt_ids", "finish_reason")


def read_prompts(path: Path) -> tuple[list[Prompt], list[dict[str, Any]]]:
    """The prompts (`prompt`, a text, or `input_ids`) and the objects of a JSON-lines file.

    Raises:
        UserError: no such file, not UTF-8, a bad line (its number is given), or no line at all.
    """
    prompts: list[Prompt] = []
    records = []
    for where, record in read_jsonl(path, "prompts"):
        require(
            isinstance(record, dict),
            f'{where} must be an object such as {{"prompt": "It is"}}, not '
            f"{json.dumps(record)[:40]!r}.",
        )
        ids, text = record.get("input_ids"), record.get("prompt")
        good_ids = isinstance(ids, list) and all(type(token) is int for token in ids)
        require(
            good_ids != isinstance(text, str),
            f"{where} needs either `prompt` (a text) or `input_ids` (a list of ids).",
        )
        prompts.append(text if isinstance(text, str) else list(ids or []))
        records.append(record)
    return prompts, records


def sample(
    checkpoint_folder: Path,
    texts: Sequence[str] | None,
    file: Path | None,
    out: Path | None,
    device: str,
    config: SamplerConfig,
) -> None:
    """Generate from either `texts` or `file`: each result is shown, or appended to `out`, at once.

    The same call goes on with an `out` that it did not finish.

    Raises:
        UserError: a bad prompt, before anything is generated; `out` holds something else, or the
            disk was too full for it; as of `Checkpoint.load` and `generate`.
    """
    if file is not None:
        prompts, records = read_prompts(file)
    else:
        prompts = list(texts or [])
        records = [{"prompt": text} for text in prompts]
    results = None if out is None else ResultFile(out, _FOUND)
    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    for place, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            check_ids(prompt, checkpoint.vocab_size, f"{file}, prompt {place + 1}")
    done = (
        set() if results is None else results.begin(_identity(checkpoint, config, records), records)
    )
    places = [place for place in range(len(prompts)) if place not in done]
    if not places:
        say(f"All {len(done):,} results are in {out} already.")
    stream = generate_stream(
        checkpoint, [prompts[place] for place in places], config, prompt_indices=places
    )
    with tqdm(total=len(places), desc="sampling", unit="prompt", disable=None) as bar:
        for place, result in zip(places, stream, strict=True):
            if results is None:
                _show(prompts[place], result, checkpoint)
            else:
                found = {name: getattr(result, name) for name in _FOUND}
                results.append(records[place], found)
            bar.update()
    if results is not None:
        results.finish()


def _identity(
    checkpoint: Checkpoint, config: SamplerConfig, records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """All that decides the results. The batch size does not, so that it may be lowered."""
    sampler = dataclasses.asdict(config)
    del sampler["batch_size"]
    prompts = {"count": len(records), "sha256": digest(records)}
    return {**checkpoint.identity(), "sampler": sampler, "prompts": prompts}


def _show(prompt: Prompt, result: GenerationResult, checkpoint: Checkpoint) -> None:
    before = prompt if isinstance(prompt, str) else checkpoint.tokenizer.decode(prompt)
    ending = f"[{result.finish_reason}, {len(result.token_ids)} tokens]"
    # Not past the bar: it stands in the terminal's last line.
    tqdm.write(f"{before}|{result.text}\n{ending}\n", file=sys.stdout)

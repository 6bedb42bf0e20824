"""The `sample` verb: prompts from the command line or a file, results to the screen or a file."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import require
from cola_train.devices import named_device
from cola_train.families.generate import generate_stream
from cola_train.families.registry import load_checkpoint
from cola_train.files import json_lines, read_jsonl, require_new, write_atomically

Prompt = str | list[int]


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
    """Generate from either `texts` or `file`; print, or write JSON lines to `out`, a new file."""
    if file is not None:
        prompts, records = read_prompts(file)
    else:
        prompts = list(texts or [])
        records = [{"prompt": text} for text in prompts]
    require_new(out)
    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    results = []
    with tqdm(total=len(prompts), desc="sampling", unit="prompt", disable=None) as bar:
        for result in generate_stream(checkpoint, prompts, config):
            results.append(result)
            bar.update()
    if out is not None:
        names = ("text", "token_ids", "prompt_ids", "finish_reason")
        rows = [
            record | {name: getattr(result, name) for name in names}
            for record, result in zip(records, results, strict=True)
        ]
        write_atomically(out, json_lines(rows))
        return
    for prompt, result in zip(prompts, results, strict=True):
        shown = prompt if isinstance(prompt, str) else checkpoint.tokenizer.decode(prompt)
        sys.stdout.write(
            f"{shown}|{result.text}\n[{result.finish_reason}, {len(result.token_ids)} tokens]\n\n"
        )

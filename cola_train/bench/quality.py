"""`cola-train bench quality`: how near few steps of a solver come to the path of many."""

import dataclasses
from pathlib import Path
from typing import Any

from cola_train.bench.config import NOVELS, BenchQualityConfig
from cola_train.config.data import CorpusConfig
from cola_train.console import say
from cola_train.data.sources import read_documents
from cola_train.devices import named_device
from cola_train.evaluation.writing.sample import read_prompts
from cola_train.families.registry import load_checkpoint


def run_quality(checkpoint_folder: Path, config: BenchQualityConfig, device: str) -> dict[str, Any]:
    """Measure each solver's distance to the reference, by its steps, on a trained checkpoint.

    Also shows it to the user as a table in Markdown.

    Raises:
        UserError: no such checkpoint or device, or prompts that cannot be read.
    """
    checkpoint = load_checkpoint(checkpoint_folder, named_device(device))
    encode = checkpoint.tokenizer.encode
    if config.prompts is not None:
        given, _ = read_prompts(Path(config.prompts))
        prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    else:
        prompts = [encode(text)[: config.prompt_tokens] for text in _passages(config.num_prompts)]
    rows = checkpoint.compare_solvers(
        prompts, config.sampler, config.solvers, config.steps, config.reference_steps
    )
    lines = [
        "| solver | steps | network calls | latent RMS error | tokens equal | CPU s a sample "
        "| distinct 4-grams |",
        "| --- |" + " ---: |" * 6,
    ]
    lines += [
        f"| {row.solver} | {row.num_steps} | {row.network_calls} | {row.latent_rms_error:.3f} "
        f"| {row.token_agreement:.1%} | {row.cpu_seconds_per_sample:.3f} "
        f"| {row.distinct_4gram_share:.3f} |"
        for row in rows
    ]
    say("\n".join(lines) + "\n")
    return {
        "checkpoint": str(checkpoint_folder),
        "prompts": len(prompts),
        "reference_steps": config.reference_steps,
        "sampler": dataclasses.asdict(config.sampler),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _passages(count: int) -> list[str]:
    """Long paragraphs of the included novels, spread evenly over them."""
    novels = read_documents(CorpusConfig(inputs=[str(NOVELS)]))
    paragraphs = [text for text in novels if len(text) > 400]
    return [paragraphs[place * len(paragraphs) // count] for place in range(count)]

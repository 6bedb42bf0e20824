"""Made-up samples of the benchmarks, and tiny checkpoints of each family that can read them: a
token a byte.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cola_train.data.tokenizer import TRAINED_SPECIAL_TOKENS, Tokenizer
from cola_train.evaluation.benchmarks.tasks import TASKS_WITH_CHOICES, Sample
from cola_train.families.checkpoint import Checkpoint
from tests.helpers.llama import tiny_baseline
from tests.helpers.tiny import calm, tiny_checkpoint, tiny_dit, tiny_vae

FAMILIES = ("cola", "ar", "llada")
_WORDS = (
    "the",
    "of",
    "a",
    "to",
    "letter",
    "carriage",
    "sister",
    "walked",
    "spoke",
    "ball",
    "Darcy",
    "hall",
    "he'd",
    "half-past",
    "naïve",
)


def byte_tokenizer() -> Tokenizer:
    """The special tokens, then each byte."""
    alphabet = [*TRAINED_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: number for number, token in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(TRAINED_SPECIAL_TOKENS))
    return Tokenizer(tokenizer.to_str().encode())


def reader(family: str) -> Checkpoint:
    """A tiny checkpoint of "cola", "ar" or "llada", with random weights."""
    tokenizer = byte_tokenizer()
    if family == "cola":
        checkpoint: Checkpoint = tiny_checkpoint(
            calm(tiny_vae(vocab_size=tokenizer.vocab_size)), calm(tiny_dit())
        )
    else:
        checkpoint = tiny_baseline(causal=family == "ar", vocab_size=tokenizer.vocab_size)
    checkpoint.tokenizer = tokenizer
    checkpoint.training = {"stage": family, "step": 3, "run": "made-up"}
    return checkpoint


def text(generator: random.Random, longest: int = 30) -> str:
    return " ".join(generator.choices(_WORDS, k=generator.randint(1, longest)))


def make_samples(task: str, count: int, seed: int = 0) -> list[Sample]:
    """Of mixed lengths; ids count from 1, squad's are strings."""
    generator = random.Random(f"{task} {seed}")
    samples = []
    for number in range(1, count + 1):
        choices = tuple(
            text(generator, 4) for _ in range({"siqa": 3, "story_cloze": 2}.get(task, 4))
        )
        if task not in TASKS_WITH_CHOICES:
            choices = ()
        samples.append(
            Sample(
                id=f"{number:04x}" if task == "squad" else number,
                question=text(generator),
                ground_truth=generator.choice(choices) if choices else text(generator, 2),
                choices=choices,
                context=text(generator) if task == "squad" else "",
            )
        )
    return samples


def write_samples(folder: Path, task: str, samples: Sequence[Sample]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(sample.to_json(), ensure_ascii=False) + "\n" for sample in samples]
    (folder / f"{task}.jsonl").write_text("".join(lines), encoding="utf-8")

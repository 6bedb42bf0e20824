"""One page on what a joint run has learned: reconstruction, flow matching against a bound, spelling, continuations."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from cola_train.config.load import load_config
from cola_train.config.runs import JointRunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.evaluation.latents.held_out import HeldOutFlow, held_out_flow, reconstruction_accuracy
from cola_train.evaluation.writing.words import known_word_share, words
from cola_train.files import write_atomically
from cola_train.hf_format import Checkpoint
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.initialise import initialise_dit
from cola_train.sampling.generate import GenerationResult, generate

_NUM_OPENINGS = 64
_NUM_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Spelling:
    """Share of words that the training text contains, and out of how many."""

    trained: tuple[float, int]
    untrained_prior: tuple[float, int]
    held_out: tuple[float, int]

    @property
    def progress(self) -> float:
        """How far the trained model has come from the untrained prior's share to held-out text's; 1 is all the way."""
        way = self.held_out[0] - self.untrained_prior[0]
        return (self.trained[0] - self.untrained_prior[0]) / way if way else 0.0


def write_report(vae_run: Path, joint_run: Path, sampler: SamplerConfig) -> str:
    """Evaluate both runs' exports on the joint run's held-out rows; write JOINT_RUN/report.md and return its text."""
    config = load_config(JointRunConfig, joint_run / "config.yaml")
    data = PreparedData.open(config.data.path)
    before, after = Checkpoint.load(vae_run), Checkpoint.load(joint_run)
    num_rows = data.num_rows(VALIDATION)
    accuracy = tuple(reconstruction_accuracy(checkpoint, data, num_rows, config.seed) for checkpoint in (before, after))
    flow = held_out_flow(after, data, num_rows, config.objective.flow, config.seed)
    openings, endings = held_out_openings(data, _NUM_OPENINGS, sampler.max_new_tokens)
    vocabulary = frozenset(word for text in training_texts(data) for word in words(text, whole=True))
    results = generate(after, openings, sampler)
    noise = generate(_with_untrained_prior(before, config), openings, sampler)
    spelling = Spelling(
        trained=known_word_share((result.text for result in results), vocabulary),
        untrained_prior=known_word_share((result.text for result in noise), vocabulary),
        held_out=known_word_share(endings, vocabulary),
    )
    page = _page(vae_run, joint_run, accuracy, flow, spelling, openings, results, after)
    write_atomically(joint_run / "report.md", page)
    return page


def held_out_openings(data: PreparedData, count: int, num_new: int) -> tuple[list[list[int]], list[str]]:
    """Beginnings of held-out rows, a quarter of a row each, and the text that really follows, `num_new` tokens at most."""
    num_rows, length = data.num_rows(VALIDATION), data.manifest.seq_len // 4
    chosen = random.Random(0).sample(range(num_rows), min(count, num_rows))
    rows = [data.row(VALIDATION, row)[0].tolist() for row in chosen]
    return [row[:length] for row in rows], [data.tokenizer.decode(row[length : length + num_new]) for row in rows]


def training_texts(data: PreparedData) -> Sequence[str]:
    """The training split as text, a row at a time."""
    # Words that a row's edge cuts come whole with the neighbouring row: rows are joined before words are found.
    ids = [token for row in range(data.num_rows(TRAIN)) for token in data.row(TRAIN, row)[0].tolist()]
    return [data.tokenizer.decode(ids)]


def _with_untrained_prior(checkpoint: Checkpoint, config: JointRunConfig) -> Checkpoint:
    dit = BlockCausalDiT(config.dit)
    initialise_dit(dit, config.seed)
    return dataclasses.replace(checkpoint, dit=dit.eval().requires_grad_(False))


def _page(
    vae_run: Path,
    joint_run: Path,
    accuracy: Sequence[float],
    flow: HeldOutFlow,
    spelling: Spelling,
    openings: Sequence[Sequence[int]],
    results: Sequence[GenerationResult],
    checkpoint: Checkpoint,
) -> str:
    ratio = flow.loss / flow.bound
    lines = [
        "# What this run has learned",
        "",
        "All figures are on held-out text, from the exported checkpoints.",
        "",
        f"Reconstruction accuracy: {accuracy[0]:.4f} after stage 1, {accuracy[1]:.4f} after stage 2",
        "    Share of tokens that survive the way text -> latents -> text. It should stay near 1: what is lost here, no prior can",
        "    bring back.",
        "",
        f"Flow-matching loss: {flow.loss:.4f}; a predictor that knows only mean and variance: {flow.bound:.4f}; ratio {ratio:.3f}",
        "    The DiT's squared error in predicting the velocity z_1 - z_0, beside the mean of s^2 / ((1 - t)^2 s^2 + t^2) over",
        "    times t and channels of variance s^2, the best that two moments allow. Below 1 it has learned structure.",
        "",
        f"Known words: {spelling.trained[0]:.3f} of {spelling.trained[1]} generated words are in the training text; "
        f"untrained prior {spelling.untrained_prior[0]:.3f} of {spelling.untrained_prior[1]}, "
        f"held-out text {spelling.held_out[0]:.3f} of {spelling.held_out[1]}",
        f"    {spelling.progress:.0%} of the way from noise decoded by the same VAE (0 %) to real text (100 %): does it spell?",
        "",
        "Continuations of held-out openings (the bar marks where the model takes over):",
        "",
    ]
    for opening, result in list(zip(openings, results))[:_NUM_SHOWN]:
        lines += [f"    {_one_line(checkpoint.tokenizer.decode(list(opening)))} | {_one_line(result.text)}", ""]
    lines += [
        "Where things are:",
        "",
        f"    {joint_run}/losses.png      every loss over steps; {vae_run}/losses.png the same for stage 1",
        f"    {joint_run}/metrics.jsonl   the figures behind it",
        f"    {joint_run}/hf              the exported checkpoint, in the released layout",
        "",
        "What to try next:",
        "",
        f"    cola-train sample {joint_run} --prompt 'It was' max_new_tokens=48",
        f"    cola-train joint --resume {joint_run} trainer.max_steps=<more steps>",
        "",
    ]
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())

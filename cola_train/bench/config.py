"""Settings of `cola-train bench`: what is measured, how often, and where results go."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cola_train
from cola_train.config.sampling import SamplerConfig, Solver
from cola_train.config.settings import (
    NOT_EMPTY,
    Rule,
    Settings,
    UserError,
    above_0,
    at_least,
    require,
    setting,
)

NOVELS = Path(cola_train.__file__).parent / "data" / "austen.txt.xz"  # the included text
_OUT = "A new JSON file for the result; null prints it."

_COUNTS = Rule("numbers from 1 on", lambda counts: len(counts) > 0 and min(counts) >= 1)
_SIZES = Rule(
    f"{_COUNTS.words}, each larger than the one before",
    lambda sizes: _COUNTS.holds(sizes) and sizes == sorted(set(sizes)),
)


class MemoryTooSmallError(UserError):
    """What is measured needs more memory than there is."""


def split_settings(settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The bench's own settings; and the measured run's, whose names have a dot."""
    of_run = [text for text in settings if "=" in text and "." in text.partition("=")[0]]
    return [text for text in settings if text not in of_run], of_run


def refuse_existing(*paths: Path | None) -> None:
    """Raise a UserError if one of these exists, before anything is measured."""
    for path in paths:
        require(
            path is None or not path.exists(),
            f"{path} exists and is not overwritten; choose another name.",
        )


@dataclasses.dataclass(frozen=True)
class MeasuringConfig(Settings):
    """How anything is measured: in a process of its own, several times."""

    threads: int = setting(
        1,
        help="Threads of the measuring process on a CPU; 1 measures CPU time, which is steadier.",
        rule=at_least(1),
    )
    warmups: int = setting(
        2,
        help="Runs before those that count.",
        rule=at_least(1, " (a first run does work that later ones do not)"),
    )
    runs: int = setting(
        5, help="Runs that count; their median is reported.", common=True, rule=at_least(1)
    )
    out: str | None = setting(None, help=_OUT, common=True)


@dataclasses.dataclass(frozen=True)
class BenchTrainConfig(MeasuringConfig):
    """`cola-train bench train`: optimizer steps, on random tokens."""

    workload: str = setting(
        "M", help="What trains: S, M, paper_stage1, paper_stage2, or a run's config file (.yaml)."
    )
    rows: int | None = setting(
        None, help="Rows of a micro-batch; null is the workload's own.", rule=at_least(1)
    )
    micro_batches: int | None = setting(
        None,
        help="Micro-batches of an optimizer step; null is the workload's own.",
        rule=at_least(1),
    )
    seq_len: int | None = setting(
        None, help="Tokens of a row; null is the workload's own.", rule=at_least(1)
    )
    find_rows: bool = setting(
        False,
        help=(
            "Double `rows` until memory ends or that is no faster, a short measurement each; then "
            "measure the fastest."
        ),
    )
    profile: bool = setting(
        False, help="Also give the ten operations with most time of their own (torch.profiler)."
    )


@dataclasses.dataclass(frozen=True)
class BenchSampleConfig(MeasuringConfig):
    """`cola-train bench sample`: prompts of one length continued together, none stopping early."""

    workload: str = setting(
        "M",
        help="What generates: S, M or paper (random weights), or a checkpoint folder with a DiT.",
        common=True,
    )
    batch: int = setting(
        8, help="Prompts that are continued together.", common=True, rule=at_least(1)
    )
    prompt_tokens: int = setting(
        48, help="Random token ids of each prompt.", common=True, rule=at_least(1)
    )
    device: str = setting("auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.")
    sampler: SamplerConfig = setting(
        SamplerConfig(max_new_tokens=64, eos_token_ids=(), pad_token_id=0),
        help="How they are continued; batch_size is `batch`, and nothing ends a text.",
        common=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.sampler.eos_token_ids == (),
            "sampler.eos_token_ids must be []: texts that end early are no measure of speed.",
        )
        require(
            self.sampler.batch_size in (SamplerConfig().batch_size, self.batch),
            f"sampler.batch_size is `batch` here; give batch={self.sampler.batch_size}.",
        )


@dataclasses.dataclass(frozen=True)
class BenchGrowthConfig(MeasuringConfig):
    """`cola-train bench growth`: how a training step's time and memory grow with its sizes."""

    workload: str = setting(
        "S", help="What is varied, one size at a time: S, M or a stage-2 run's config file (.yaml)."
    )
    seq_len: int = setting(
        256, help="Tokens of a row, where the length is not what varies.", rule=at_least(1)
    )
    rows: int = setting(
        4, help="Rows of a step, where the batch is not what varies.", rule=at_least(1)
    )
    batches: list[int] = setting(
        [1, 2, 4, 8], help="Rows of a step, to see growth with the batch.", rule=_SIZES
    )
    lengths: list[int] = setting(
        [128, 256, 512, 1024], help="Tokens of a row, to see growth with the length.", rule=_SIZES
    )
    block_sizes: list[int] = setting(
        [1, 4, 16, 64], help="Latents of a block, to see growth with it.", rule=_SIZES
    )
    layers: list[int] = setting(
        [2, 4, 8], help="Layers of the DiT, to see growth with depth.", rule=_SIZES
    )
    widths: list[int] = setting(
        [128, 256, 384],
        help="Widths of the DiT, to see growth with it; multiples of its head width.",
        rule=_SIZES,
    )
    figure: str | None = setting(
        None, help="Draw the growth: this path with .png and .svg added; neither may exist."
    )


@dataclasses.dataclass(frozen=True)
class BenchQualityConfig(Settings):
    """`cola-train bench quality`: how near few steps of a solver come to the path of many."""

    solvers: list[Solver] = setting(
        ["euler", "heun", "adams2", "adams3"],
        help="The solvers to compare.",
        common=True,
        rule=NOT_EMPTY,
    )
    steps: list[int] = setting(
        [2, 4, 6, 8, 10, 16, 32], help="Numbers of steps to compare.", common=True, rule=_COUNTS
    )
    reference_steps: int = setting(
        256, help="Steps of the reference.", common=True, rule=at_least(1)
    )
    prompts: str | None = setting(
        None,
        help="A file as for `cola-train sample --prompts`; null: passages of the included novels.",
    )
    num_prompts: int = setting(
        16, help="How many passages, where no file is given.", common=True, rule=at_least(1)
    )
    prompt_tokens: int = setting(
        24, help="Tokens of each passage, at most.", common=True, rule=at_least(1)
    )
    sampler: SamplerConfig = setting(
        SamplerConfig(), help="How prompts are continued, but for solver and steps."
    )
    out: str | None = setting(None, help=_OUT, common=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.reference_steps > max(self.steps),
            f"reference_steps ({self.reference_steps}) must be more than any of steps, "
            f"{self.steps}.",
        )


@dataclasses.dataclass(frozen=True)
class BenchDataConfig(Settings):
    """`cola-train bench data`: tokenizing, reading, opening a store of 10^9 rows; on one core."""

    text: str | None = setting(
        None, help="A .txt file to tokenize, a paragraph a document; null: the included novels."
    )
    tokenizer: str | None = setting(
        None, help="A tokenizer.json; null learns one of 4,096 ids from the text."
    )
    least_characters: int = setting(
        4_000_000,
        help="A shorter text is repeated to this length, its paragraphs reshuffled each time.",
        rule=at_least(1),
    )
    seq_len: int = setting(256, help="Tokens in a row.", rule=at_least(1))
    rows: int = setting(8, help="Rows of a training batch.", rule=at_least(1))
    step_seconds: float | None = setting(
        None,
        help="Training step to compare with, in seconds; null measures workload S with this batch.",
        rule=above_0(),
    )
    runs: int = setting(
        5, help="Runs that count, after one to warm up; their median is reported.", rule=at_least(1)
    )
    out: str | None = setting(None, help=_OUT)

"""Settings of the training loop: steps, processes, checkpoints, guards, alarms and logging."""

import dataclasses
from typing import Literal

from cola_train.config.amounts import Mark
from cola_train.config.settings import (
    ANY_NUMBER,
    NOT_EMPTY,
    SHARE_ABOVE_0,
    SHARE_BELOW_1,
    Rule,
    Settings,
    above_0,
    at_least,
    require,
    setting,
)

# The systems that wait have greatest times of their own, of which this is below all.
_TIMEOUT = Rule("in [1, 31536000] (a year)", lambda seconds: 1 <= seconds <= 31_536_000)
Convention = Literal["paper", "model", "executed"]


@dataclasses.dataclass(frozen=True)
class BudgetConfig(Settings):
    """How much compute a run may spend, and how it is counted (cola_train/flops/)."""

    eflops: float | None = setting(
        None,
        help="EFLOPs (10^18) at which the run ends, after the first step that reaches them.",
        rule=above_0(),
    )
    convention: Convention = setting(
        "model",
        help="What counts: paper (6 N D), model (useful work), executed (what the hardware does, "
        "recomputation included).",
    )
    nominal_parameters: int | None = setting(
        None,
        help="N of the paper's convention; null counts the DiT, or a baseline without embeddings, "
        "or the VAE without them.",
        rule=at_least(1),
    )
    marks: list[str] = setting(
        [],
        help="Where a checkpoint is made, kept for good, exported and validated: '20 EFLOPs', '1e9 "
        "tokens', 'every 10000 steps'.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for mark in self.marks:
            Mark.parse(mark, "budget.marks")


@dataclasses.dataclass(frozen=True)
class EMAConfig(Settings):
    """An exponential moving average of the weights, kept beside them; off in the headline run."""

    decay: float = setting(
        0.0,
        help="Share of the average kept at each step, such as 0.999; 0 keeps no average.",
        rule=SHARE_BELOW_1,
    )
    warm_up: bool = setting(
        True,
        help="Keep less in early steps, min(decay, (1 + n) / (10 + n)) after n steps, so that the "
        "initial weights are forgotten.",
    )
    evaluate: bool = setting(
        False, help="Validate and write sample texts with the average instead of the weights."
    )
    export: bool = setting(False, help="Export the average, not the weights, when the run ends.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.decay > 0 or not (self.evaluate or self.export),
            "ema.evaluate and ema.export need an average: set ema.decay, for example 0.999.",
        )


@dataclasses.dataclass(frozen=True)
class TrainerConfig(Settings):
    """The loop."""

    max_steps: int = setting(
        1_000_000,
        help="Optimizer steps in all; budget.eflops may end the run before.",
        common=True,
        rule=at_least(1),
    )
    global_batch_size: int = setting(
        1408,
        help="Rows per optimizer step, over all processes (paper: 1,408).",
        common=True,
        rule=at_least(1),
    )
    micro_batch_size: int = setting(
        8, help="Rows per forward and backward on one process.", common=True, rule=at_least(1)
    )
    precision: Literal["fp32", "bf16", "fp8", "auto"] = setting(
        "bf16",
        help="Forward precision; weights and optimizer state stay fp32. fp8 is bf16 with the "
        "blocks' matrix products in fp8 (pip install 'cola-train[fp8]'). auto is bf16 where "
        "the device computes it fast.",
        common=True,
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", help="Where to run.")
    compile: bool = setting(
        False,
        help="torch.compile every block, once a run: seconds to minutes at the first step, then "
        "faster; rounding differs a little.",
    )
    validate_every_steps: int = setting(
        1000,
        help="Steps between validations, always on the same noise; 0 never validates.",
        rule=at_least(0),
    )
    validation_rows: int = setting(
        1024, help="Held-out rows in a validation, at most.", rule=at_least(0)
    )
    log_every_steps: int = setting(
        10, help="Steps between lines of metrics.jsonl.", rule=at_least(1)
    )
    sample_every_steps: int = setting(
        0,
        help="Steps between sample texts (not in stage 1) in the run folder; 0 is never.",
        rule=at_least(0),
    )
    sample_prompts: list[str] = setting(
        [""], help="Prompts of the sample texts; empty generates from nothing.", rule=NOT_EMPTY
    )

    @property
    def in_bf16(self) -> bool:
        """Whether what is not computed in fp32 is in bf16, but for fp8's matrix products."""
        return self.precision in ("bf16", "fp8")


@dataclasses.dataclass(frozen=True)
class ParallelConfig(Settings):
    """How a run is spread over processes. It changes no numbers, and may change on resume."""

    num_processes: int = setting(
        1,
        help="Processes to start on this machine, one a device; torchrun overrules it.",
        common=True,
        rule=at_least(1),
    )
    strategy: Literal["single", "ddp", "fsdp2", "hsdp"] = setting(
        "fsdp2",
        help="fsdp2 shards weights, gradients and optimizer over all processes; ddp copies them to "
        "each; hsdp shards inside groups of shard_size and copies between them; single is one "
        "process.",
    )
    shard_size: int | None = setting(
        None,
        help="hsdp: processes that share one copy of the weights; null is those of one node.",
        rule=at_least(1),
    )
    activation_checkpointing: Literal["none", "selective", "full"] = setting(
        "none",
        help="What the backward pass computes again: nothing, all but matrix products and "
        "attention, or whole blocks.",
    )
    cpu_offload: bool = setting(
        False, help="Keep sharded weights, gradients and optimizer state in the host's memory."
    )
    timeout_seconds: int = setting(
        1800,
        help="A step or collective that takes longer than this ends the run with an error.",
        rule=_TIMEOUT,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.shard_size is None or self.strategy == "hsdp",
            f"parallel.shard_size is for parallel.strategy=hsdp, not {self.strategy}; leave one of "
            "them out.",
        )
        # One process may be of several that torchrun starts; it is checked where they meet.
        processes = self.num_processes
        require(
            self.strategy != "single" or processes == 1,
            f"parallel.strategy=single is for one process, not {processes}; use ddp, fsdp2 or "
            "hsdp.",
        )
        require(
            self.shard_size is None or processes == 1 or processes % self.shard_size == 0,
            f"parallel.shard_size ({self.shard_size}) must divide parallel.num_processes "
            f"({processes}).",
        )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig(Settings):
    """What a run saves to resume from."""

    every_steps: int = setting(
        1000, help="Steps between checkpoints; the last step makes one too.", rule=at_least(1)
    )
    keep: int = setting(
        3,
        help="Checkpoints kept: the newest, and always the last known good (weights finite, "
        "validation run).",
        rule=at_least(1),
    )
    asynchronous: bool = setting(
        False, help="Write in the background while training continues, from a copy in host memory."
    )
    if_damaged: Literal["stop", "previous"] = setting(
        "stop",
        help="On resume from a damaged checkpoint: stop with what is wrong, or resume from the "
        "newest intact one.",
    )


@dataclasses.dataclass(frozen=True)
class GuardConfig(Settings):
    """When a step is skipped: it uses up its rows and number; weights and optimizer stay."""

    max_skipped_in_a_row: int = setting(
        5,
        help="After this many skipped steps in a row the run stops; the last checkpoint stays.",
        rule=at_least(1),
    )
    spike_deviations: float | None = setting(
        None,
        help="Also skip a step whose loss exceeds the median of recent ones by this many robust "
        "deviations (1.4826 MAD); null skips none.",
        rule=above_0(),
    )
    spike_window: int = setting(
        100,
        help="Taken steps whose losses say what is usual, here and for alarms.spike_deviations; "
        "no loss is a spike before there are so many.",
        rule=at_least(10),
    )


@dataclasses.dataclass(frozen=True)
class AlarmsConfig(Settings):
    """When a run warns of latents that collapse or drift, or a loss that jumps; null is off."""

    min_log_snr: float | None = setting(
        0.5,
        help="Collapse: the VAE's logSNR stays below this (the paper's lowest is 1.0; a fresh VAE "
        "starts at 0).",
        rule=ANY_NUMBER,
    )
    min_active_units: float | None = setting(
        0.5,
        help="Collapse: a smaller share of channels is active, where the run is inspected "
        "(in_loop_eval.evaluators).",
        rule=SHARE_ABOVE_0,
    )
    max_reference_kl: float | None = setting(
        100.0,
        help="Drift: KL(q || q_ref) stays above this, nats per token (with 16 channels about 3.5 "
        "sigma in each).",
        rule=above_0(),
    )
    spike_deviations: float | None = setting(
        10.0,
        help="Spike: the loss exceeds the median of recent ones (guard.spike_window) by this many "
        "robust deviations (1.4826 MAD).",
        rule=above_0(),
    )
    raise_after: int = setting(
        100,
        help="Steps in a row beyond min_log_snr or max_reference_kl that raise the alarm. Those "
        "below min_log_snr count once it was above, or warm-up is over, or the weighted KL "
        "outweighs reconstruction.",
        rule=at_least(1),
    )
    clear_after: int = setting(
        20, help="Steps in a row back in bounds that end it.", rule=at_least(1)
    )
    stop: bool = setting(
        False, help="Stop the run at an alarm, with a checkpoint; the same command resumes it."
    )


@dataclasses.dataclass(frozen=True)
class WandbConfig(Settings):
    """Weights & Biases, off unless asked for."""

    enabled: bool = setting(False, help="Also log to wandb (pip install 'cola-train[wandb]').")
    online: bool = setting(False, help="Use the network; false writes files, to be synced by hand.")
    project: str = setting("cola-train", help="The wandb project.")

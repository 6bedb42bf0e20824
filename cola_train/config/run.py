"""What the configs of all runs share, and which of its settings make a run what it is."""

import abc
import dataclasses
import os

from cola_train.config.amounts import Amount
from cola_train.config.data import DataConfig
from cola_train.config.evaluation import InLoopEvalConfig
from cola_train.config.load import leaves, value_at
from cola_train.config.loop import (
    AlarmsConfig,
    BudgetConfig,
    CheckpointConfig,
    EMAConfig,
    GuardConfig,
    ParallelConfig,
    TrainerConfig,
    WandbConfig,
)
from cola_train.config.optim import OptimConfig
from cola_train.config.settings import SEED, Settings, require, section, setting

# What may change when a run resumes: who computes, what is kept and shown, and how long. All else
# makes it another run.
_MAY_CHANGE = (
    "parallel.",
    "checkpoint.",
    "guard.",
    "in_loop_eval.",
    "alarms.",
    "wandb.",
    "budget.eflops",
    "budget.marks",
    "runs_folder",
    "data.path",
    "data.num_workers",
    "ema.evaluate",
    "ema.export",
    "trainer.max_steps",
    "trainer.micro_batch_size",
    "trainer.accelerator",
    "trainer.compile",
    "trainer.validate_every_steps",
    "trainer.validation_rows",
    "trainer.log_every_steps",
    "trainer.sample_every_steps",
    "trainer.sample_prompts",
)
_LONGEST_NAME = 200  # file systems have 255, and what a run is named in adds to it


@dataclasses.dataclass(frozen=True)
class RunConfig(Settings, abc.ABC):
    """What all runs share: a family's config adds its networks, `objective` and `stage`."""

    name: str = setting(help="The run's name: its folder under runs_folder.", common=True)
    data: DataConfig = section(DataConfig, help="The prepared data.")
    optim: OptimConfig = section(OptimConfig, help="Optimization.")
    budget: BudgetConfig = section(BudgetConfig, help="Compute.")
    ema: EMAConfig = section(EMAConfig, help="A moving average of the weights.")
    trainer: TrainerConfig = section(TrainerConfig, help="The loop.")
    parallel: ParallelConfig = section(ParallelConfig, help="How the run is spread over processes.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, help="What is saved to resume from.")
    guard: GuardConfig = section(GuardConfig, help="When a step is not taken.")
    in_loop_eval: InLoopEvalConfig = section(
        InLoopEvalConfig, help="What is evaluated while the run trains.", common=False
    )
    alarms: AlarmsConfig = section(AlarmsConfig, help="When the run says that something is wrong.")
    wandb: WandbConfig = section(WandbConfig, help="Weights & Biases.")
    runs_folder: str = setting("checkpoints", help="Folder that holds the runs.")
    seed: int = setting(66, help="Seed of weights, noise, times and masks (paper: 66).", rule=SEED)
    data_seed: int = setting(6198, help="Seed of the order of rows (paper: 6198).", rule=SEED)
    warm_start_from: str | None = setting(
        None, help="The run whose weights this one started from; `cola-train warm-start` sets it."
    )
    stage: str = setting("", help="The family that a saved config is of.")
    branched_from: str | None = setting(
        None, help="The run and step that this one continues; `cola-train branch` sets it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"name must be a plain folder name, not {self.name!r}.",
        )
        require(
            len(os.fsencode(self.name)) <= _LONGEST_NAME,
            f"name must have at most {_LONGEST_NAME} bytes, to be a folder's; this one has "
            f"{len(os.fsencode(self.name))}.",
        )
        rows, micro = self.trainer.global_batch_size, self.trainer.micro_batch_size
        processes = self.parallel.num_processes
        require(
            rows % (micro * processes) == 0,
            f"trainer.global_batch_size ({rows}) must be a multiple of trainer.micro_batch_size x "
            f"parallel.num_processes ({micro} x {processes} = {micro * processes}).",
        )
        require(
            not (self.trainer.precision == "fp8" and self.trainer.accelerator == "cpu"),
            "trainer.precision=fp8 needs a GPU, and trainer.accelerator is cpu; use bf16.",
        )
        names = ("warmup", "decay", "anneal")
        amounts = [Amount.parse(getattr(self.optim, name), f"optim.{name}") for name in names]
        in_flops = [amount.unit == "EFLOPs" for amount in amounts]
        require(
            not (any(in_flops) and self.budget.convention == "executed"),
            "optim.warmup, decay and anneal cannot be EFLOPs with budget.convention=executed: what "
            "is executed depends on how a run is spread over devices, and the learning rate must "
            "not. Use paper or model.",
        )
        if not any(in_flops):
            tokens = rows * self.data.seq_len
            self.optim.check_horizons(*(amount.in_steps(tokens) for amount in amounts))
        pad = self.in_loop_eval.benchmarks.sampler.pad_token_id
        require(
            pad is None or pad < self.vocab_size,
            f"in_loop_eval.benchmarks.sampler.pad_token_id must be below {self.vocab_size_key} "
            f"({self.vocab_size}), not {pad}.",
        )

    @property
    @abc.abstractmethod
    def vocab_size_key(self) -> str:
        """The setting that holds `vocab_size`, for messages."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the networks know."""
        return int(value_at(self, self.vocab_size_key))

    @property
    def masks_documents(self) -> bool:
        """Whether training keeps the documents of a packed row apart."""
        return False

    def differing_keys(self, other: "RunConfig") -> list[str]:
        """The settings that make `other` another run; empty if it may resume this one."""
        listed = []
        for key, _ in leaves(type(self)):
            ours, theirs = value_at(self, key), value_at(other, key)
            # `auto` is what it was decided to be when the run began.
            decided = key == "trainer.precision" and theirs == "auto"
            if ours != theirs and not decided and not key.startswith(_MAY_CHANGE):
                listed.append(key)
        return listed

    def differences(self, other: "RunConfig") -> list[str]:
        """What makes `other` another run, as "key: ours, now theirs"."""
        return [
            f"{key}: {value_at(self, key)!r}, now {value_at(other, key)!r}"
            for key in self.differing_keys(other)
        ]

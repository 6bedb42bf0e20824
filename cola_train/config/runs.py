"""The two stages' whole configs, and which of their settings make a run what it is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cola_train.config.data import DataConfig
from cola_train.config.load import leaves, load_config, read_values
from cola_train.config.loop import (
    CheckpointConfig,
    EMAConfig,
    GuardConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
    WandbConfig,
)
from cola_train.config.models import DiTConfig, TextVAEConfig, check_pair, check_seq_len
from cola_train.config.objectives import Stage1Config, Stage2Config
from cola_train.config.settings import require, section, setting

# What may change when a run goes on: who computes, what is kept and shown, and how long. All else makes it another run.
_MAY_CHANGE = (
    "parallel.", "checkpoint.", "guard.", "wandb.", "runs_folder", "data.path", "data.num_workers", "ema.evaluate", "ema.export",
    "trainer.max_steps", "trainer.micro_batch_size", "trainer.accelerator", "trainer.validate_every_steps",
    "trainer.validation_rows", "trainer.log_every_steps", "trainer.sample_every_steps", "trainer.sample_prompts",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What both stages share."""

    name: str = setting(help="The run's name: its folder under runs_folder.")
    data: DataConfig = section(DataConfig, help="The prepared data.")
    vae: TextVAEConfig = section(TextVAEConfig, help="The Text VAE.")
    optim: OptimConfig = section(OptimConfig, help="Optimisation.")
    ema: EMAConfig = section(EMAConfig, help="A moving average of the weights.")
    trainer: TrainerConfig = section(TrainerConfig, help="The loop.")
    parallel: ParallelConfig = section(ParallelConfig, help="How the run is spread over processes.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, help="What is saved to go on from.")
    guard: GuardConfig = section(GuardConfig, help="When a step is not taken.")
    wandb: WandbConfig = section(WandbConfig, help="Weights & Biases.")
    runs_folder: str = setting("checkpoints", help="Folder that holds the runs.")
    seed: int = setting(66, help="Seed of weights, noise, times and masks (paper: 66).")
    data_seed: int = setting(6198, help="Seed of the order of rows (paper: 6198).")
    warm_start_from: str | None = setting(
        None, help="The run whose weights this one started from; `cola-train warm-start` sets it."
    )

    def __post_init__(self) -> None:
        require(self.name not in ("", ".", "..") and "/" not in self.name, f"name must be a plain folder name, not {self.name!r}.")
        require(0 <= self.seed < 2**63 and 0 <= self.data_seed < 2**63, "seed and data_seed must be in [0, 2^63).")
        rows, micro, processes = self.trainer.global_batch_size, self.trainer.micro_batch_size, self.parallel.num_processes
        require(rows % (micro * processes) == 0,
                f"trainer.global_batch_size ({rows}) must be a multiple of trainer.micro_batch_size x parallel.num_processes "
                f"({micro} x {processes} = {micro * processes}).")  # fmt: skip

    def differences(self, other: "RunConfig") -> list[str]:
        """The settings that make `other` another run than this, as "key: ours, theirs"; empty if it can go on with it."""
        listed = []
        for key, _ in leaves(type(self)):
            ours, theirs = _value(self, key), _value(other, key)
            # `auto` is what it was decided to be when the run began.
            decided = key == "trainer.precision" and theirs == "auto"
            if ours != theirs and not decided and not key.startswith(_MAY_CHANGE):
                listed.append(f"{key}: {ours!r}, now {theirs!r}")
        return listed

    def _check_log_snr(self, fixed_log_snr: float | None) -> None:
        require(fixed_log_snr is None or self.vae.bias,
                "objective.fixed_log_snr needs vae.bias=true: the export states the constant variance in a bias.")  # fmt: skip
        plain = (self.vae.scaling_factor, self.vae.shifting_factor) == (1.0, 0.0)
        require(fixed_log_snr is None or plain,
                "objective.fixed_log_snr needs vae.scaling_factor=1 and shifting_factor=0: only there E[mu^2] is 1.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAERunConfig(RunConfig):
    """`cola-train vae`: stage 1."""

    stage: Literal["vae"] = setting("vae", help="Which stage a saved config is of.")
    objective: Stage1Config = section(Stage1Config, help="Stage 1's losses.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_log_snr(self.objective.fixed_log_snr)
        check_seq_len(self.data.seq_len, self.vae.patch_size, self.vae.block_size)


@dataclasses.dataclass(frozen=True)
class JointRunConfig(RunConfig):
    """`cola-train joint`: stage 2."""

    stage: Literal["joint"] = setting("joint", help="Which stage a saved config is of.")
    dit: DiTConfig = section(DiTConfig, help="The DiT.")
    objective: Stage2Config = section(Stage2Config, help="Stage 2's losses.")
    init_vae_from: str | None = setting(None, help="Checkpoint folder whose VAE to start from; null starts from scratch.")
    init_dit_from: str | None = setting(None, help="Checkpoint folder whose DiT to start from; null starts from scratch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_log_snr(self.objective.fixed_log_snr)
        check_pair(self.vae, self.dit)
        check_seq_len(self.data.seq_len, self.vae.patch_size, self.dit.block_size)
        scratch = self.init_vae_from is None
        require(not (scratch and self.objective.reference_weight > 0),
                "objective.reference_weight needs a stage-1 encoder to stay near: give init_vae_from, or set "
                "objective.reference_weight=0 (All Scratch).")  # fmt: skip
        require(not (scratch and self.objective.vae_strategy.mode == "fix"),
                "objective.vae_strategy.mode 'fix' needs a trained VAE: give init_vae_from, or use mode 'joint'.")  # fmt: skip


def _value(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> "VAERunConfig | JointRunConfig":
    """A config file of either stage: it is stage 2's if it says so (as saved ones do) or speaks of a DiT.

    Raises:
        UserError: as `load_config`.
    """
    values = read_values(path)
    joint = values.get("stage") == "joint" or "dit" in values
    return load_config(JointRunConfig if joint else VAERunConfig, path, overrides)  # type: ignore[return-value]  # one of the two

"""Settings of a run: optimisation, the loop, logging, and the two stages' whole configs."""

import dataclasses
from typing import Literal

from cola_train.config.data import DataConfig
from cola_train.config.models import DiTConfig, TextVAEConfig, check_pair, check_seq_len
from cola_train.config.objectives import Stage1Config, Stage2Config
from cola_train.config.settings import require, section, setting


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW and the paper's schedule: linear warm-up, then cosine (Tables 8 and 10)."""

    learning_rate: float = setting(1.5e-4, help="Peak learning rate, reached at warmup_steps.")
    start_learning_rate: float = setting(1e-6, help="Learning rate of step 0.")
    final_learning_rate: float = setting(1e-5, help="Learning rate from decay_steps on.")
    warmup_steps: int = setting(5000, help="Optimizer steps of linear warm-up.")
    decay_steps: int = setting(1_000_000, help="Optimizer step at which the cosine ends.")
    beta1: float = setting(0.9, help="AdamW's first moment decay.")
    beta2: float = setting(0.95, help="AdamW's second moment decay.")
    eps: float = setting(1e-8, help="AdamW's epsilon; not stated in the paper.")
    weight_decay: float = setting(0.01, help="Decoupled weight decay of every parameter, times the learning rate.")
    gradient_clip: float = setting(1.0, help="Largest global norm of the gradient.")

    def __post_init__(self) -> None:
        require(0 <= self.warmup_steps < self.decay_steps,
                f"optim.warmup_steps ({self.warmup_steps}) must be in 0..decay_steps - 1 ({self.decay_steps}).")  # fmt: skip
        require(self.learning_rate > 0, f"optim.learning_rate must be above 0, not {self.learning_rate}.")
        require(self.gradient_clip > 0, f"optim.gradient_clip must be above 0, not {self.gradient_clip}.")
        require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1,
                f"optim.beta1 and beta2 must be in [0, 1), not {self.beta1} and {self.beta2}.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """The loop."""

    max_steps: int = setting(1_000_000, help="Optimizer steps in all.")
    global_batch_size: int = setting(1408, help="Rows per optimizer step, over all processes (paper: 1,408).")
    micro_batch_size: int = setting(8, help="Rows per forward and backward on one process.")
    precision: Literal["fp32", "bf16", "auto"] = setting(
        "bf16", help="Forward precision; weights and optimizer state stay fp32. auto is bf16 where the device computes it fast."
    )
    accelerator: Literal["auto", "cpu", "gpu"] = setting("auto", help="Where to run.")
    num_processes: int = setting(1, help="Processes, one a device, on each node.")
    validate_every_steps: int = setting(1000, help="Steps between validations, always on the same noise; 0 never validates.")
    validation_rows: int = setting(1024, help="Rows of the held-out split in a validation, at most.")
    log_every_steps: int = setting(10, help="Steps between lines of metrics.jsonl.")
    checkpoint_every_steps: int = setting(1000, help="Steps between checkpoints; the last step always makes one.")
    keep_checkpoints: int = setting(3, help="Checkpoints kept, the newest.")
    sample_every_steps: int = setting(0, help="Stage 2: steps between sample texts, written to the run folder; 0 is never.")
    sample_prompts: list[str] = setting([""], help="Stage 2: prompts of the sample texts; empty generates from nothing.")

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "num_processes", "log_every_steps",
                     "checkpoint_every_steps", "keep_checkpoints"):  # fmt: skip
            value = getattr(self, name)
            require(value >= 1, f"trainer.{name} must be at least 1, not {value}.")
        for name in ("validate_every_steps", "validation_rows", "sample_every_steps"):
            require(getattr(self, name) >= 0, f"trainer.{name} must be 0 or more, not {getattr(self, name)}.")
        share = self.micro_batch_size * self.num_processes
        require(self.global_batch_size % share == 0,
                f"trainer.global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size x num_processes "
                f"({self.micro_batch_size} x {self.num_processes} = {share}).")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, off unless asked for."""

    enabled: bool = setting(False, help="Also log to wandb (pip install 'cola-train[wandb]').")
    online: bool = setting(False, help="Use the network; false writes files only, to be synced by hand.")
    project: str = setting("cola-train", help="The wandb project.")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What both stages share."""

    name: str = setting(help="The run's name: its folder under runs_folder.")
    data: DataConfig = section(DataConfig, help="The prepared data.")
    vae: TextVAEConfig = section(TextVAEConfig, help="The Text VAE.")
    optim: OptimConfig = section(OptimConfig, help="Optimisation.")
    trainer: TrainerConfig = section(TrainerConfig, help="The loop.")
    wandb: WandbConfig = section(WandbConfig, help="Weights & Biases.")
    runs_folder: str = setting("checkpoints", help="Folder that holds the runs.")
    seed: int = setting(66, help="Seed of weights, noise, times and masks (paper: 66).")
    data_seed: int = setting(6198, help="Seed of the order of rows (paper: 6198).")

    def __post_init__(self) -> None:
        require(self.name not in ("", ".", "..") and "/" not in self.name, f"name must be a plain folder name, not {self.name!r}.")
        require(0 <= self.seed < 2**63 and 0 <= self.data_seed < 2**63, "seed and data_seed must be in [0, 2^63).")

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

"""The whole config of a run, of either stage or of a baseline, and which of its settings make a run what it is."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cola_train.config.alarms import AlarmsConfig
from cola_train.config.amounts import Amount
from cola_train.config.baselines import AutoregressiveConfig, MaskedDiffusionConfig, TransformerConfig
from cola_train.config.data import DataConfig
from cola_train.config.load import build_config, leaves, read_values, value_at
from cola_train.config.loop import (
    BudgetConfig,
    CheckpointConfig,
    EMAConfig,
    GuardConfig,
    ParallelConfig,
    TrainerConfig,
    WandbConfig,
)
from cola_train.config.models import DiTConfig, TextVAEConfig, check_pair, check_seq_len
from cola_train.config.objectives import Stage1Config, Stage2Config
from cola_train.config.optim import OptimConfig
from cola_train.config.settings import UserError, require, section, setting
from cola_train.config.watch import WatchConfig

# What may change when a run goes on: who computes, what is kept and shown, and how long. All else makes it another run.
_MAY_CHANGE = (
    "parallel.", "checkpoint.", "guard.", "watch.", "alarms.", "wandb.", "budget.eflops", "budget.marks", "runs_folder",
    "data.path", "data.num_workers", "ema.evaluate", "ema.export",
    "trainer.max_steps", "trainer.micro_batch_size", "trainer.accelerator", "trainer.compile", "trainer.validate_every_steps",
    "trainer.validation_rows", "trainer.log_every_steps", "trainer.sample_every_steps", "trainer.sample_prompts",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What all runs share."""

    name: str = setting(help="The run's name: its folder under runs_folder.", common=True)
    data: DataConfig = section(DataConfig, help="The prepared data.")
    optim: OptimConfig = section(OptimConfig, help="Optimization.")
    budget: BudgetConfig = section(BudgetConfig, help="Compute.")
    ema: EMAConfig = section(EMAConfig, help="A moving average of the weights.")
    trainer: TrainerConfig = section(TrainerConfig, help="The loop.")
    parallel: ParallelConfig = section(ParallelConfig, help="How the run is spread over processes.")
    checkpoint: CheckpointConfig = section(CheckpointConfig, help="What is saved to go on from.")
    guard: GuardConfig = section(GuardConfig, help="When a step is not taken.")
    watch: WatchConfig = section(WatchConfig, help="What is evaluated while the run trains.", common=False)
    alarms: AlarmsConfig = section(AlarmsConfig, help="When the run says that something is wrong with it.")
    wandb: WandbConfig = section(WandbConfig, help="Weights & Biases.")
    runs_folder: str = setting("checkpoints", help="Folder that holds the runs.")
    seed: int = setting(66, help="Seed of weights, noise, times and masks (paper: 66).")
    data_seed: int = setting(6198, help="Seed of the order of rows (paper: 6198).")
    warm_start_from: str | None = setting(
        None, help="The run whose weights this one started from; `cola-train warm-start` sets it."
    )
    branched_from: str | None = setting(None, help="The run and step that this one goes on from; `cola-train branch` sets it.")

    def __post_init__(self) -> None:
        require(self.name not in ("", ".", "..") and "/" not in self.name, f"name must be a plain folder name, not {self.name!r}.")
        require(0 <= self.seed < 2**63 and 0 <= self.data_seed < 2**63, "seed and data_seed must be in [0, 2^63).")
        rows, micro, processes = self.trainer.global_batch_size, self.trainer.micro_batch_size, self.parallel.num_processes
        require(rows % (micro * processes) == 0,
                f"trainer.global_batch_size ({rows}) must be a multiple of trainer.micro_batch_size x parallel.num_processes "
                f"({micro} x {processes} = {micro * processes}).")  # fmt: skip

        horizons = (self.optim.warmup, self.optim.decay, self.optim.anneal)
        in_flops = any(Amount.parse(text, "optim").unit == "EFLOPs" for text in horizons)
        require(not (in_flops and self.budget.convention == "executed"),
                "optim.warmup, decay and anneal cannot be EFLOPs with budget.convention=executed: what is executed depends on how "
                "a run is spread over devices, and the learning rate must not. Use paper or model.")  # fmt: skip

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the networks know."""
        raise NotImplementedError

    def differences(self, other: "RunConfig") -> list[str]:
        """The settings that make `other` another run than this, as "key: ours, theirs"; empty if it can go on with it."""
        listed = []
        for key, _ in leaves(type(self)):
            ours, theirs = value_at(self, key), value_at(other, key)
            # `auto` is what it was decided to be when the run began.
            decided = key == "trainer.precision" and theirs == "auto"
            if ours != theirs and not decided and not key.startswith(_MAY_CHANGE):
                listed.append(f"{key}: {ours!r}, now {theirs!r}")
        return listed


@dataclasses.dataclass(frozen=True)
class ColaRunConfig(RunConfig):
    """What both stages of Cola DLM share."""

    vae: TextVAEConfig = section(TextVAEConfig, help="The Text VAE.")

    @property
    def vocab_size(self) -> int:
        """See RunConfig."""
        return self.vae.vocab_size

    def _check_log_snr(self, fixed_log_snr: float | None) -> None:
        require(fixed_log_snr is None or self.vae.bias,
                "objective.fixed_log_snr needs vae.bias=true: the export states the constant variance in a bias.")  # fmt: skip
        plain = (self.vae.scaling_factor, self.vae.shifting_factor) == (1.0, 0.0)
        require(fixed_log_snr is None or plain,
                "objective.fixed_log_snr needs vae.scaling_factor=1 and shifting_factor=0: only there E[mu^2] is 1.")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAERunConfig(ColaRunConfig):
    """`cola-train vae`: stage 1."""

    stage: Literal["vae"] = setting("vae", help="Which stage a saved config is of.")
    objective: Stage1Config = section(Stage1Config, help="Stage 1's losses.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.watch.check_family(("inspection",), self.stage)
        self._check_log_snr(self.objective.fixed_log_snr)
        check_seq_len(self.data.seq_len, self.vae.patch_size, self.vae.block_size)


@dataclasses.dataclass(frozen=True)
class JointRunConfig(ColaRunConfig):
    """`cola-train joint`: stage 2."""

    stage: Literal["joint"] = setting("joint", help="Which stage a saved config is of.")
    dit: DiTConfig = section(DiTConfig, help="The DiT.")
    objective: Stage2Config = section(Stage2Config, help="Stage 2's losses.")
    init_vae_from: str | None = setting(
        None, help="Checkpoint folder whose VAE to start from; null starts from scratch.", common=True
    )
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


@dataclasses.dataclass(frozen=True)
class BaselineRunConfig(RunConfig):
    """What both baselines share."""

    transformer: TransformerConfig = section(TransformerConfig, help="The network.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.watch.check_family(("likelihood", "benchmarks"), "ar or llada")

    @property
    def vocab_size(self) -> int:
        """See RunConfig."""
        return self.transformer.vocab_size


@dataclasses.dataclass(frozen=True)
class AutoregressiveRunConfig(BaselineRunConfig):
    """`cola-train ar`: the autoregressive baseline."""

    stage: Literal["ar"] = setting("ar", help="Which stage a saved config is of.")
    objective: AutoregressiveConfig = section(AutoregressiveConfig, help="The loss.")


@dataclasses.dataclass(frozen=True)
class LLaDARunConfig(BaselineRunConfig):
    """`cola-train llada`: the masked diffusion baseline."""

    stage: Literal["llada"] = setting("llada", help="Which stage a saved config is of.")
    objective: MaskedDiffusionConfig = section(MaskedDiffusionConfig, help="The loss.")


StageConfig = VAERunConfig | JointRunConfig | AutoregressiveRunConfig | LLaDARunConfig
# By the verb that trains it, which is also what a config file may say as `stage`.
STAGES: dict[str, type[RunConfig]] = {
    "vae": VAERunConfig, "joint": JointRunConfig, "ar": AutoregressiveRunConfig, "llada": LLaDARunConfig,
}  # fmt: skip


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> StageConfig:
    """A config file of any stage: of the one that it names as `stage` (as saved ones do), else of stage 2 if it speaks of a DiT.

    Raises:
        UserError: as `load_config`; an unknown stage, or a baseline's file that does not say which.
    """
    values = read_values(path)
    stage = values.get("stage", "joint" if "dit" in values else "vae")
    if stage not in STAGES or ("transformer" in values and "stage" not in values):
        raise UserError(f"{path} must say what it is for as `stage:`, one of {', '.join(STAGES)}, not {values.get('stage')!r}.")
    return build_config(STAGES[stage], values, str(path), overrides)  # type: ignore[return-value]  # one of these

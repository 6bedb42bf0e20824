"""Settings of Cola DLM's two stages; a default that the paper does not state says so."""

import dataclasses
from typing import Literal

from cola_train.config.load import value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import (
    ANY_NUMBER,
    SHARE,
    SHARE_ABOVE_0,
    Rule,
    Settings,
    above_0,
    at_least,
    require,
    section,
    setting,
)
from cola_train.models.config import DiTConfig, TextVAEConfig, check_pair, check_seq_len

_MASK_RATIO = Rule(
    f"{SHARE_ABOVE_0.words} (mask_weight=0 leaves the mask loss out)", SHARE_ABOVE_0.holds
)
# Beyond it variances are none of fp32.
_LOG_SNR = Rule("in [-40, 40]", lambda value: -40 <= value <= 40)


@dataclasses.dataclass(frozen=True)
class Stage1Config(Settings):
    """Text VAE pretraining: reconstruction + kl_weight KL + mask_weight mask loss."""

    kl_weight: float = setting(
        1e-4,
        help="beta: weight of KL(q || N(0, I)), in nats per token; not stated in the paper.",
        rule=at_least(0),
    )
    mask_weight: float = setting(
        1.0,
        help="lambda_mask: weight of the BERT-style mask loss; not stated in the paper.",
        rule=at_least(0),
    )
    mask_ratio: float = setting(
        0.15,
        help="Share of a row's real tokens replaced by [mask], always [mask]; not stated.",
        rule=_MASK_RATIO,
    )
    fixed_log_snr: float | None = setting(
        None,
        help="Hold log(E mu^2 / sigma^2) at this (paper: 1.0, 1.5, 2.0); null learns it.",
        rule=_LOG_SNR,
    )
    mask_documents: bool = setting(
        False, help="Keep documents of a packed row apart; needs document_alignment; not stated."
    )


@dataclasses.dataclass(frozen=True)
class VAEStrategyConfig(Settings):
    """How the VAE takes part in stage 2: Fix, Joint x1, Joint x0.01, Interval.

    All Scratch is Joint without init_vae_from.
    """

    mode: Literal["joint", "fix", "interval"] = setting(
        "joint", help="Train the VAE always, never, or in intervals."
    )
    learning_rate_factor: float = setting(
        1.0, help="VAE learning rate over the DiT's (paper: 1 and 0.01).", rule=at_least(0)
    )
    joint_steps: int = setting(
        2000,
        help="interval: steps of a cycle in which the VAE trains, first (paper: 2k of 5k).",
        rule=at_least(1),
    )
    frozen_steps: int = setting(
        3000,
        help="interval: steps of a cycle in which it rests (paper: 3k of 5k).",
        rule=at_least(1),
    )

    def trains_vae(self, step: int) -> bool:
        """Whether the VAE takes part in optimizer step `step`, counted from 0."""
        if self.mode == "interval":
            return step % (self.joint_steps + self.frozen_steps) < self.joint_steps
        return self.mode == "joint"

    def shortened(self, num_steps: int) -> "VAEStrategyConfig":
        """A cycle of a sixth of `num_steps`, joint for the same share of it; Fix becomes Joint."""
        cycle = max(2, num_steps // 6)
        share = self.joint_steps / (self.joint_steps + self.frozen_steps)
        joint = min(cycle - 1, max(1, round(cycle * share)))
        mode = "joint" if self.mode == "fix" else self.mode
        return dataclasses.replace(self, mode=mode, joint_steps=joint, frozen_steps=cycle - joint)


@dataclasses.dataclass(frozen=True)
class FlowConfig(Settings):
    """Conditional flow matching: times, pinned prompts, history."""

    time_distribution: Literal["logit_normal", "uniform"] = setting(
        "logit_normal",
        help="t = sigmoid(normal), as in the headline run, or uniform, the ablation.",
    )
    time_loc: float = setting(1.0, help="Mean of the normal under the sigmoid.", rule=ANY_NUMBER)
    time_scale: float = setting(
        1.0, help="Standard deviation of the normal under the sigmoid.", rule=above_0()
    )
    timestep_per: Literal["sample", "block"] = setting(
        "sample", help="One t for a row, or one for each of its blocks."
    )
    prompt_block_prob: float = setting(
        0.05,
        help="Probability that a block's first 1..block_size-1 positions stay clean.",
        rule=SHARE,
    )
    history_dropout: float = setting(
        0.0,
        help="Probability that a block's history is hidden, for guidance; not stated.",
        rule=SHARE,
    )
    noise_copies: int = setting(
        1,
        help="Noised copies of a row, each with its own noise, times and prompts, over one clean "
        "copy: (1 + K) L positions.",
        rule=at_least(1),
    )
    grad_to_encoder: bool = setting(
        True, help="fm_grad_to_encoder: z_t keeps its gradient to the encoder; not the target."
    )
    learn_padding: bool = setting(
        False, help="Count padding in a text's last block, which samplers must write; not stated."
    )


@dataclasses.dataclass(frozen=True)
class Stage2Config(Settings):
    """Joint training of VAE and DiT.

    vae_weight (reconstruction + entropy_weight E[log q] + mask_weight mask) + flow_weight flow
    + reference_weight KL(q || q_ref), and with a codebook code_weight code
    """

    vae_weight: float = setting(1.0, help="lambda_VAE; not stated in the paper.", rule=at_least(0))
    entropy_weight: float = setting(
        1e-4,
        help="beta of stage 2: weight of E[log q], nats per token; not stated.",
        rule=at_least(0),
    )
    mask_weight: float = setting(
        1.0, help="lambda_mask of stage 2; not stated in the paper.", rule=at_least(0)
    )
    mask_ratio: float = setting(
        0.15,
        help="Share of a row's real tokens replaced by [mask] in stage 2; not stated.",
        rule=_MASK_RATIO,
    )
    flow_weight: float = setting(1.0, help="lambda_fm; not stated in the paper.", rule=at_least(0))
    code_weight: float = setting(
        1.0,
        help="Weight of the cross-entropy of dit.head=codebook, beside the flow's squared error; "
        "not of the paper.",
        rule=at_least(0),
    )
    reference_weight: float = setting(
        1e-2,
        help="lambda_ref: weight of KL(q || q_ref), nats per token; not stated.",
        rule=at_least(0),
    )
    fixed_log_snr: float | None = setting(
        None, help="Hold the VAE's logSNR at this; null learns it.", rule=_LOG_SNR
    )
    mask_documents: bool = setting(
        False, help="Keep documents of a packed row apart; needs document_alignment; not stated."
    )
    flow: FlowConfig = section(FlowConfig, help="Flow matching.")
    vae_strategy: VAEStrategyConfig = section(VAEStrategyConfig, help="How the VAE takes part.")


@dataclasses.dataclass(frozen=True)
class ColaRunConfig(RunConfig):
    """What both stages of Cola DLM share."""

    vae: TextVAEConfig = section(TextVAEConfig, help="The Text VAE.")

    vocab_size_key = "vae.vocab_size"  # the DiT knows no tokens

    @property
    def fixed_log_snr(self) -> float | None:
        """The logSNR at which the VAE is held, if it is."""
        return value_at(self, "objective.fixed_log_snr")

    @property
    def masks_documents(self) -> bool:
        return bool(value_at(self, "objective.mask_documents"))

    def _check_log_snr(self) -> None:
        if self.fixed_log_snr is None:
            return
        require(
            self.vae.bias,
            "objective.fixed_log_snr needs vae.bias=true: the export states the constant variance "
            "in a bias.",
        )
        require(
            (self.vae.scaling_factor, self.vae.shifting_factor) == (1.0, 0.0),
            "objective.fixed_log_snr needs vae.scaling_factor=1 and shifting_factor=0: only there "
            "E[mu^2] is 1.",
        )


@dataclasses.dataclass(frozen=True)
class VAERunConfig(ColaRunConfig):
    """`cola-train vae`: stage 1."""

    stage: Literal["vae"] = setting("vae", help="Which stage a saved config is of.")
    objective: Stage1Config = section(Stage1Config, help="Stage 1's losses.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_loop_eval.check_family(("inspection",), self.stage)
        self._check_log_snr()
        check_seq_len(self.data.seq_len, self.vae.patch_size, self.vae.block_size)


@dataclasses.dataclass(frozen=True)
class Stage2RunConfig(ColaRunConfig):
    """What `cola-train joint` and `cola-train distill` share."""

    dit: DiTConfig = section(DiTConfig, help="The DiT.")
    objective: Stage2Config = section(Stage2Config, help="Stage 2's losses.")
    init_vae_from: str | None = setting(
        None,
        help="Checkpoint folder whose VAE to start from; null starts from scratch.",
        common=True,
    )
    init_dit_from: str | None = setting(
        None, help="Checkpoint whose DiT to start from, of any block_size; null draws it."
    )

    @property
    def vae_from(self) -> str | None:
        """The checkpoint whose VAE the run starts from."""
        return self.init_vae_from

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_log_snr()
        check_pair(self.vae, self.dit)
        check_seq_len(self.data.seq_len, self.vae.patch_size, self.dit.block_size)
        has_vae = self.vae_from is not None
        require(
            has_vae or self.objective.reference_weight == 0,
            "objective.reference_weight needs a stage-1 encoder to stay near: give init_vae_from, "
            "or set objective.reference_weight=0 (All Scratch).",
        )
        require(
            has_vae or self.objective.vae_strategy.mode != "fix",
            "objective.vae_strategy.mode 'fix' needs a trained VAE: give init_vae_from, or use "
            "mode 'joint'.",
        )
        require(
            self.dit.head == "velocity" or self.objective.vae_strategy.mode == "fix",
            "dit.head=codebook needs objective.vae_strategy.mode=fix: its codes are measured once, "
            "at the start, and a VAE that trains would move away from them.",
        )


@dataclasses.dataclass(frozen=True)
class JointRunConfig(Stage2RunConfig):
    """`cola-train joint`: stage 2."""

    stage: Literal["joint"] = setting("joint", help="Which stage a saved config is of.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillRunConfig(Stage2RunConfig):
    """`cola-train distill`: stage 2 by a trained DiT's velocities instead of the data's."""

    stage: Literal["distill"] = setting("distill", help="Which stage a saved config is of.")
    teacher_from: str = setting(
        help="Checkpoint folder whose DiT teaches, over its VAE; needed until the run has ended.",
        common=True,
    )

    @property
    def vae_from(self) -> str | None:
        return self.teacher_from

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.init_vae_from is None and self.objective.vae_strategy.mode == "fix",
            "distill takes the VAE of teacher_from as it is, for velocities are of one VAE's "
            "latents: leave init_vae_from out, and set objective.vae_strategy.mode=fix.",
        )
        require(
            self.dit.head == "velocity",
            "distill trains a DiT in the released layout: leave dit.head=codebook to its teacher.",
        )

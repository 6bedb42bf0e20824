"""Settings of both stages' losses; a default that the paper does not state says so."""

import dataclasses
from typing import Literal

from cola_train.config.settings import (
    ANY_NUMBER,
    SHARE,
    SHARE_ABOVE_0,
    Rule,
    Settings,
    above_0,
    at_least,
    section,
    setting,
)

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
    target: Literal["sample", "posterior"] = setting(
        "sample",
        help="What a velocity learns from: z_1 - z_0, or its mean given z_t and q(z_0 | x), for "
        "the DiT the same on average and less noisy; not of the paper.",
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

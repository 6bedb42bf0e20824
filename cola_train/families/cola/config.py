"""Settings of Cola DLM's runs."""

import dataclasses
from typing import Literal

from cola_train.config.load import value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require, section, setting
from cola_train.families.cola.bits.sizes import bits_for, least_units, least_width
from cola_train.families.cola.losses import Stage1Config, Stage2Config
from cola_train.models.config import DiTConfig, TextVAEConfig, check_pair, check_seq_len


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
    init_as: Literal["drawn", "bits"] = setting(
        "drawn",
        help="What no checkpoint gives: drawn, or a written VAE whose latents are bits of tokens, "
        "and a DiT that denoises each bit by itself; not of the paper.",
    )

    @property
    def vae_from(self) -> str | None:
        """The checkpoint whose VAE the run starts from."""
        return self.init_vae_from

    @property
    def has_vae(self) -> bool:
        """Whether the run starts with a VAE that encodes and decodes."""
        return self.vae_from is not None or self.init_as == "bits"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_log_snr()
        check_pair(self.vae, self.dit)
        check_seq_len(self.data.seq_len, self.vae.patch_size, self.dit.block_size)
        require(
            self.has_vae or self.objective.reference_weight == 0,
            "objective.reference_weight needs a stage-1 encoder to stay near: give init_vae_from, "
            "or set objective.reference_weight=0 (All Scratch).",
        )
        require(
            self.has_vae or self.objective.vae_strategy.mode != "fix",
            "objective.vae_strategy.mode 'fix' needs a trained VAE: give init_vae_from, or use "
            "mode 'joint'.",
        )
        require(
            self.dit.head == "velocity" or self.objective.vae_strategy.mode == "fix",
            "dit.head=codebook needs objective.vae_strategy.mode=fix: its codes are measured once, "
            "at the start, and a VAE that trains would move away from them.",
        )
        if self.init_as == "bits":
            self._check_bits()

    def _check_bits(self) -> None:
        require(
            self.init_vae_from is None and self.init_dit_from is None,
            "init_as=bits writes the VAE and the DiT: leave init_vae_from and init_dit_from out.",
        )
        require(
            self.dit.head == "velocity",
            "init_as=bits is for a DiT in the released layout: leave dit.head=codebook out, which "
            "reads any codes.",
        )
        require(
            self.fixed_log_snr is not None,
            "init_as=bits needs objective.fixed_log_snr: how much noise is on the bits.",
        )
        require(
            self.vae.patch_size == 1,
            f"init_as=bits needs vae.patch_size=1, not {self.vae.patch_size}: bits are of one "
            "token.",
        )
        channels, least = self.vae.latent_dim, 2 * bits_for(self.vae.vocab_size)
        require(
            channels % 2 == 0 and channels >= least,
            f"init_as=bits needs two channels a bit, and {self.vae.vocab_size} tokens need "
            f"{least // 2} bits: set vae.latent_dim to an even number from {least} on, not "
            f"{channels}.",
        )
        require(
            self.vae.dim >= channels,
            f"init_as=bits needs vae.dim ({self.vae.dim}) of at least vae.latent_dim ({channels}).",
        )
        width, units = least_width(channels), least_units(channels)
        require(
            self.dit.txt_dim >= width and self.dit.txt_dim * self.dit.expand_ratio >= units,
            f"init_as=bits needs dit.txt_dim of at least {width} and {units} hidden units "
            f"(dit.txt_dim x dit.expand_ratio) for vae.latent_dim={channels}, not "
            f"{self.dit.txt_dim} and {self.dit.txt_dim * self.dit.expand_ratio}.",
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

    def _check_bits(self) -> None:
        raise UserError(
            "distill takes the VAE of teacher_from as it is: leave init_as=bits out, which writes "
            "a VAE of its own."
        )

"""Stage 2 of Cola DLM, as families: by the data, or by a trained DiT's velocities."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cola_train.config.settings import UserError, require
from cola_train.families.cola.config import DistillRunConfig, JointRunConfig, Stage2RunConfig
from cola_train.families.cola.family import SMALL_WIDTH, ColaFamily
from cola_train.families.cola.flops import dit_parameters, stage2_work, vae_parameters
from cola_train.families.cola.workloads import GENERATION, STAGE2
from cola_train.families.family import MatchTarget, Phase, TrainedRun
from cola_train.flops.work import Parts
from cola_train.models.config import DiTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.data.prepared import PreparedData
    from cola_train.families.cola.checkpoint import ColaCheckpoint
    from cola_train.families.cola.stage2 import Stage2Objective

Stage2T = TypeVar("Stage2T", bound=Stage2RunConfig)
_JOINT, _FROZEN = "joint", "frozen"


class _Stage2Family(ColaFamily[Stage2T]):
    """VAE and DiT."""

    def dit_config(self, config: Stage2T) -> DiTConfig | None:
        return config.dit

    def teacher_config(self, config: Stage2T) -> DiTConfig | None:
        """The DiT that teaches, where one does."""
        return None

    def build(self, config: Stage2T) -> "Stage2Objective":
        from cola_train.families.cola.stage2 import Stage2Objective
        from cola_train.models.dit import BlockCausalDiT
        from cola_train.models.text_vae import TextVAE

        vae, dit = TextVAE(config.vae), BlockCausalDiT(config.dit)
        taught_by = self.teacher_config(config)
        teacher = None if taught_by is None else BlockCausalDiT(taught_by)
        return Stage2Objective(vae, dit, config.objective, config.seed, teacher)

    def initial_values(
        self, config: Stage2T, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        """Drawn or read from checkpoints; the reference encoder is a copy of the VAE's."""
        from cola_train.families.cola.start import dit_values, vae_values

        yield from vae_values(config, config.vae_from, shapes)
        yield from dit_values(config, shapes)

    def check_start(self, config: Stage2T, data: "PreparedData") -> None:
        """Checkpoints to start from must have the run's networks and tokenizer."""
        from cola_train.families.cola.start import check_start

        check_start(config, data)

    def phases(self, config: Stage2T) -> Sequence[Phase]:
        """Interval alternates between joint and frozen steps; Joint and Fix have one phase."""
        strategy = config.objective.vae_strategy
        if strategy.mode == "interval":
            return Phase(_JOINT, strategy.joint_steps), Phase(_FROZEN, strategy.frozen_steps)
        return (Phase(_JOINT if strategy.mode == "joint" else _FROZEN, 1),)

    def step_work(self, config: Stage2T, phase: str) -> Parts:
        return stage2_work(config, phase == _JOINT, self.teacher_config(config))

    def parameters(self, config: Stage2T) -> dict[str, int]:
        """VAE and DiT, without the frozen ones: a teacher, the reference encoder."""
        return {**vae_parameters(config.vae), **dit_parameters(config.dit)}

    def backbone_parameters(self, config: Stage2T) -> int:
        """The DiT's, without the embedding and the vocabulary head of a codebook."""
        parts = dit_parameters(config.dit).items()
        return sum(count for part, count in parts if part not in ("dit.embedding", "dit.head"))

    def reference(
        self, run: TrainedRun[Stage2T], device: "str | torch.device"
    ) -> "ColaCheckpoint | None":
        """The VAE with the encoder that stage 2 started from, where reference_weight keeps one."""
        from cola_train.families.cola.checkpoint import in_memory
        from cola_train.tensor_files import Below

        reference = Below(run.weights, "reference_encoder.")
        encoder = {f"vae.encoder.{name}": value for name, value in reference.items()}
        if not encoder:
            return None
        weights = {**run.weights, **encoder}
        return in_memory(dataclasses.replace(run, weights=weights), None, device)

    def shrink(self, config: Stage2T, num_steps: int) -> dict[str, Any]:
        """Also a narrow DiT of two layers, and objectives that need no first stage.

        A VAE that would be fixed trains, and so the DiT has no codebook.
        """
        layers = min(config.dit.num_layers, 2)
        dit = dataclasses.replace(
            config.dit, num_layers=layers, head="velocity", vocab_size=None, embeds_codes=False
        )
        if dit.txt_dim > SMALL_WIDTH:
            width = SMALL_WIDTH
            dit = dataclasses.replace(
                dit, txt_dim=width, emb_dim=width, heads=2, head_dim=16, rope_dim=8
            )
        strategy = config.objective.vae_strategy.shortened(num_steps)
        return super().shrink(config, num_steps) | {
            "dit": dit,
            "init_vae_from": None,
            "init_dit_from": None,
            "objective": dataclasses.replace(
                config.objective, reference_weight=0.0, vae_strategy=strategy
            ),
        }

    def uncounted_start(self, config: Stage2T) -> str | None:
        return config.vae_from

    def match_target(self, config: Stage2T) -> MatchTarget:
        notes = []
        if config.vae_from is not None:
            notes.append(
                f"Stage 1, which trained the VAE that {config.name} starts from, comes on top: no "
                "tokens or FLOPs of it are here."
            )
        if config.budget.nominal_parameters is not None:
            notes.append(
                f"The paper's convention takes N = {config.budget.nominal_parameters:,} for "
                f"{config.name}, by its budget.nominal_parameters, and the counted backbone for "
                "the others."
            )
        dit = config.dit
        return MatchTarget(dit.txt_dim, dit.num_layers, dit.head_dim, tuple(notes))

    def describe(self, config: Stage2T) -> str:
        return f"DiT {config.dit.num_layers} x {config.dit.txt_dim}, {super().describe(config)}"

    def growth_settings(self, config: Stage2T, size: str, value: int) -> tuple[str, ...]:
        dit = config.dit
        sizes = {"block_size": dit.block_size, "layers": dit.num_layers, "width": dit.txt_dim}
        if value == sizes[size]:
            return ()
        if size != "width":
            return (f"dit.{'num_layers' if size == 'layers' else size}={value}",)
        require(
            value % dit.head_dim == 0,
            f"widths must be multiples of the workload's head width, {dit.head_dim}, not {value}.",
        )
        heads = value // dit.head_dim
        return (f"dit.txt_dim={value}", f"dit.emb_dim={value}", f"dit.heads={heads}")


class JointFamily(_Stage2Family[JointRunConfig]):
    """Stage 2: VAE and DiT."""

    name = "joint"
    config = JointRunConfig
    summary = "stage 2: train VAE and DiT jointly"
    example = "configs/small/joint_quickstart.yaml"
    stage1_key = "init_vae_from"
    workloads = STAGE2
    generation_workloads = GENERATION

    def initial_values(
        self, config: JointRunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        from cola_train.families.cola.bits.start import written_values

        written = config.init_as == "bits"
        return (written_values if written else super().initial_values)(config, shapes)

    def shrink(self, config: JointRunConfig, num_steps: int) -> dict[str, Any]:
        """Also networks that are drawn, for which any size will do."""
        return super().shrink(config, num_steps) | {"init_as": "drawn"}


class DistillFamily(_Stage2Family[DistillRunConfig]):
    """Stage 2 with a teacher: a DiT in the released layout from one with a codebook."""

    name = "distill"
    config = DistillRunConfig
    summary = "teach a DiT in the released layout the velocities of one with a codebook"
    example = "configs/small/distill_quickstart.yaml teacher_from=checkpoints/my-run"
    stage1_key = "teacher_from"

    def recognizes(self, folder: Path) -> bool:
        """None: what it ships is a checkpoint of stage 2."""
        return False

    def teacher_config(self, config: DistillRunConfig) -> DiTConfig | None:
        from cola_train.families.cola.start import teacher_config

        return teacher_config(config)

    def initial_values(
        self, config: DistillRunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        from cola_train.families.cola.start import teacher_values

        yield from super().initial_values(config, shapes)
        yield from teacher_values(config)

    def check_start(self, config: DistillRunConfig, data: "PreparedData") -> None:
        from cola_train.families.cola.start import check_teacher

        super().check_start(config, data)
        check_teacher(config, data)

    def shrink(self, config: DistillRunConfig, num_steps: int) -> dict[str, Any]:
        raise UserError(
            "A run that is taught cannot be made small: its teacher is what it is. Give a run of "
            "`cola-train joint`."
        )

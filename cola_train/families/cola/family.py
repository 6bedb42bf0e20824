"""Cola DLM's two stages, as families."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cola_train.config.loop import AlarmsConfig
from cola_train.config.settings import require
from cola_train.families.cola.config import ColaRunConfig, JointRunConfig, VAERunConfig
from cola_train.families.cola.flops import dit_parameters, stage2_work, vae_parameters, vae_work
from cola_train.families.cola.workloads import GENERATION, STAGE1, STAGE2
from cola_train.families.family import Family, MatchTarget, Phase, TrainedRun
from cola_train.flops.work import Parts
from cola_train.models.config import DiTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.data.prepared import PreparedData
    from cola_train.families.cola.checkpoint import ColaCheckpoint
    from cola_train.families.cola.stage1 import Stage1Objective
    from cola_train.families.cola.stage2 import Stage2Objective

ColaT = TypeVar("ColaT", bound=ColaRunConfig)
_JOINT, _FROZEN = "joint", "frozen"
# For `cola-train chaos`.
_SMALL_WIDTH = 32


class _ColaFamily(Family[ColaT]):
    """What both stages share: a VAE, and the layout of their checkpoints."""

    def dit_config(self, config: ColaT) -> DiTConfig | None:
        """The DiT that a run trains; None in stage 1."""
        return None

    def check_data(self, config: ColaT, data: "PreparedData") -> None:
        """With mask_documents, documents must start on block boundaries."""
        if config.masks_documents:
            blocks = self.dit_config(config) or config.vae
            multiple = config.vae.patch_size * blocks.block_size
            alignment = data.manifest.document_alignment
            require(
                alignment % multiple == 0,
                "objective.mask_documents needs documents that start on block boundaries: the "
                f"data was prepared with document_alignment={alignment}, this model needs a "
                f"multiple of {multiple}. Prepare it again so.",
            )

    def alarms(self, config: ColaT) -> AlarmsConfig:
        """No alarm about a logSNR that the config fixes."""
        fixed = config.fixed_log_snr is not None
        return dataclasses.replace(config.alarms, min_log_snr=None) if fixed else config.alarms

    def recognizes(self, folder: Path) -> bool:
        """cola_dlm/cola_vae, with a DiT's folder beside it after stage 2."""
        root = folder / "cola_dlm"
        has_dit = any((root / name).is_dir() for name in ("cola_dit", "cola_codebook_dit"))
        return (root / "cola_vae").is_dir() and has_dit == (self.name == "joint")

    def load(self, folder: Path, device: "str | torch.device" = "cpu") -> "ColaCheckpoint":
        from cola_train.families.cola.checkpoint import ColaCheckpoint

        return ColaCheckpoint.load(folder, device)

    def write(
        self, folder: Path, run: TrainedRun[ColaT], *, replace: bool, max_shard_bytes: int
    ) -> None:
        from cola_train.families.cola.format import vae_weights, write_checkpoint
        from cola_train.tensor_files import Below

        config, dit_config = run.config, self.dit_config(run.config)
        write_checkpoint(
            folder,
            (config.vae, vae_weights(config, run.weights)),
            None if dit_config is None else (dit_config, Below(run.weights, "dit.")),
            run.tokenizer,
            run.training,
            replace=replace,
            max_shard_bytes=max_shard_bytes,
        )

    def checkpoint(self, run: TrainedRun[ColaT], device: "str | torch.device") -> "ColaCheckpoint":
        from cola_train.families.cola.checkpoint import in_memory

        return in_memory(run, self.dit_config(run.config), device)

    def shrink(self, config: ColaT, num_steps: int) -> dict[str, Any]:
        """A narrow VAE with one block in the encoder and one in the decoder."""
        vae = dataclasses.replace(
            config.vae,
            ffn_dim=min(config.vae.ffn_dim, 2 * _SMALL_WIDTH),
            encoder_num_blocks=1,
            decoder_num_blocks=1,
        )
        if vae.dim > _SMALL_WIDTH:
            vae = dataclasses.replace(vae, dim=_SMALL_WIDTH, num_heads=2)
        return {"vae": vae}

    def describe(self, config: ColaT) -> str:
        vae = config.vae
        return f"VAE {vae.encoder_num_blocks} + {vae.decoder_num_blocks} x {vae.dim}"


class TextVAEFamily(_ColaFamily[VAERunConfig]):
    """Stage 1: the VAE alone."""

    name = "vae"
    config = VAERunConfig
    summary = "stage 1: train the Text VAE"
    example = "configs/small/vae_quickstart.yaml"
    writes_text = False
    workloads = STAGE1

    def build(self, config: VAERunConfig) -> "Stage1Objective":
        from cola_train.families.cola.stage1 import Stage1Objective
        from cola_train.models.text_vae import TextVAE

        return Stage1Objective(TextVAE(config.vae), config.objective, config.seed)

    def initial_values(
        self, config: VAERunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        from cola_train.families.cola.format import vae_values

        return vae_values(config, None, shapes)

    def step_work(self, config: VAERunConfig, phase: str) -> Parts:
        return vae_work(config)

    def parameters(self, config: VAERunConfig) -> dict[str, int]:
        return dict(vae_parameters(config.vae))


class JointFamily(_ColaFamily[JointRunConfig]):
    """Stage 2: VAE and DiT."""

    name = "joint"
    config = JointRunConfig
    summary = "stage 2: train VAE and DiT jointly"
    example = "configs/small/joint_quickstart.yaml"
    stage1_key = "init_vae_from"
    workloads = STAGE2
    generation_workloads = GENERATION

    def dit_config(self, config: JointRunConfig) -> DiTConfig | None:
        return config.dit

    def build(self, config: JointRunConfig) -> "Stage2Objective":
        from cola_train.families.cola.stage2 import Stage2Objective
        from cola_train.models.dit import BlockCausalDiT
        from cola_train.models.text_vae import TextVAE

        vae, dit = TextVAE(config.vae), BlockCausalDiT(config.dit)
        return Stage2Objective(vae, dit, config.objective, config.seed)

    def initial_values(
        self, config: JointRunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        """Drawn or read from checkpoints; the reference encoder is a copy of the VAE's."""
        from cola_train.families.cola.format import dit_values, vae_values

        yield from vae_values(config, config.init_vae_from, shapes)
        yield from dit_values(config, shapes)

    def check_start(self, config: JointRunConfig, data: "PreparedData") -> None:
        """Checkpoints to start from must have the run's networks and tokenizer."""
        from cola_train.families.cola.format import check_start

        check_start(config, data)

    def phases(self, config: JointRunConfig) -> Sequence[Phase]:
        """Interval alternates between joint and frozen steps; Joint and Fix have one phase."""
        strategy = config.objective.vae_strategy
        if strategy.mode == "interval":
            return Phase(_JOINT, strategy.joint_steps), Phase(_FROZEN, strategy.frozen_steps)
        return (Phase(_JOINT if strategy.mode == "joint" else _FROZEN, 1),)

    def step_work(self, config: JointRunConfig, phase: str) -> Parts:
        return stage2_work(config, phase == _JOINT)

    def parameters(self, config: JointRunConfig) -> dict[str, int]:
        """VAE and DiT; the frozen reference encoder is a copy and not among them."""
        return {**vae_parameters(config.vae), **dit_parameters(config.dit)}

    def backbone_parameters(self, config: JointRunConfig) -> int:
        """The DiT's, without the vocabulary head of a codebook."""
        parts = dit_parameters(config.dit).items()
        return sum(count for part, count in parts if part != "dit.head")

    def reference(
        self, run: TrainedRun[JointRunConfig], device: "str | torch.device"
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

    def shrink(self, config: JointRunConfig, num_steps: int) -> dict[str, Any]:
        """Also a narrow DiT of two layers, and objectives that need no first stage.

        A VAE that would be fixed trains, and so the DiT has no codebook.
        """
        layers = min(config.dit.num_layers, 2)
        dit = dataclasses.replace(config.dit, num_layers=layers, head="velocity", vocab_size=None)
        if dit.txt_dim > _SMALL_WIDTH:
            width = _SMALL_WIDTH
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

    def uncounted_start(self, config: JointRunConfig) -> str | None:
        return config.init_vae_from

    def match_target(self, config: JointRunConfig) -> MatchTarget:
        notes = []
        if config.init_vae_from is not None:
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

    def describe(self, config: JointRunConfig) -> str:
        return f"DiT {config.dit.num_layers} x {config.dit.txt_dim}, {super().describe(config)}"

    def growth_settings(self, config: JointRunConfig, size: str, value: int) -> tuple[str, ...]:
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

"""Cola DLM's two stages, as families."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cola_train.config.alarms import AlarmsConfig
from cola_train.config.settings import require
from cola_train.families.cola.config import (
    ColaRunConfig,
    JointRunConfig,
    VAERunConfig,
    VAEStrategyConfig,
)
from cola_train.families.cola.parameters import dit_parameters, vae_parameters
from cola_train.families.family import Family, MatchTarget, Phase, TrainedRun
from cola_train.models.config import DiTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.data.prepared import PreparedData
    from cola_train.families.cola.checkpoint import ColaCheckpoint
    from cola_train.families.cola.stage1 import Stage1Objective
    from cola_train.families.cola.stage2 import Stage2Objective
    from cola_train.flops.work import Parts

ColaT = TypeVar("ColaT", bound=ColaRunConfig)
_JOINT, _FROZEN = "joint", "frozen"
# For `cola-train chaos`.
_SMALL_WIDTH = 32
# For `cola-train bench`, small enough for one thread of a CPU: the DiT alone trains, on latents of
# a frozen VAE.
_FROZEN_VAE = (
    "init_vae_from=random",
    "objective.vae_strategy.mode=fix",
    "trainer.precision=fp32",
    "vae.block_size=1",
    "dit.block_size=16",
)
_S = (
    "vae.vocab_size=1024",
    "vae.dim=128",
    "vae.ffn_dim=512",
    "vae.num_heads=4",
    "vae.encoder_num_blocks=2",
    "vae.decoder_num_blocks=2",
    "dit.num_layers=4",
    "dit.txt_dim=128",
    "dit.emb_dim=128",
    "dit.heads=4",
    "dit.head_dim=32",
    "dit.rope_dim=24",
)
_M = (
    "vae.vocab_size=4096",
    "vae.dim=256",
    "vae.ffn_dim=1024",
    "vae.num_heads=4",
    "vae.encoder_num_blocks=4",
    "vae.decoder_num_blocks=4",
    "dit.num_layers=8",
    "dit.txt_dim=384",
    "dit.emb_dim=384",
    "dit.heads=6",
    "dit.head_dim=64",
    "dit.rope_dim=48",
)


def _batch(rows: int, seq_len: int) -> tuple[str, ...]:
    return (
        f"trainer.micro_batch_size={rows}",
        f"trainer.global_batch_size={rows}",
        f"data.seq_len={seq_len}",
    )


class _ColaFamily(Family[ColaT]):
    """What both stages share."""

    def check_data(self, config: ColaT, data: "PreparedData") -> None:
        """With mask_documents, documents must start on block boundaries."""
        if config.masks_documents:
            multiple, alignment = (
                config.vae.patch_size * self._block_size(config),
                data.manifest.document_alignment,
            )
            require(
                alignment % multiple == 0,
                "objective.mask_documents needs documents that start on block boundaries: the "
                f"data was prepared with document_alignment={alignment}, this model needs a "
                f"multiple of {multiple}. Prepare it again so.",
            )

    def _block_size(self, config: ColaT) -> int:
        return config.vae.block_size

    def alarms(self, config: ColaT) -> AlarmsConfig:
        """A fixed logSNR is as it was asked for."""
        fixed = config.fixed_log_snr is not None
        return dataclasses.replace(config.alarms, min_log_snr=None) if fixed else config.alarms

    def recognizes(self, folder: Path) -> bool:
        """cola_dlm/cola_vae, with cola_dlm/cola_dit after stage 2."""
        root = folder / "cola_dlm"
        return (root / "cola_vae").is_dir() and (root / "cola_dit").is_dir() == (
            self.name == "joint"
        )

    def load(self, folder: Path, device: "str | torch.device" = "cpu") -> "ColaCheckpoint":
        """The released layout, ours or the released one."""
        from cola_train.families.cola.checkpoint import ColaCheckpoint

        return ColaCheckpoint.load(folder, device)

    def write(
        self, folder: Path, run: TrainedRun[ColaT], *, replace: bool, max_shard_bytes: int
    ) -> None:
        from cola_train.families.cola.export import vae_weights
        from cola_train.families.cola.format import write_checkpoint
        from cola_train.tensor_files import Below

        dit_config = self._dit(run.config)
        vae = (run.config.vae, vae_weights(run.config, Below(run.weights, "vae.")))
        dit = None if dit_config is None else (dit_config, Below(run.weights, "dit."))
        write_checkpoint(
            folder,
            vae,
            dit,
            run.tokenizer,
            run.training,
            replace=replace,
            max_shard_bytes=max_shard_bytes,
        )

    def _dit(self, config: ColaT) -> DiTConfig | None:
        return None

    def checkpoint(self, run: TrainedRun[ColaT], device: "str | torch.device") -> "ColaCheckpoint":
        from cola_train.families.cola.export import in_memory

        return in_memory(
            run.config, self._dit(run.config), run.weights, run.tokenizer, run.training, device
        )

    def shrink(self, config: ColaT, num_steps: int) -> dict[str, Any]:
        """A narrow VAE of a block a side."""
        vae = config.vae
        width: dict[str, Any] = (
            {} if vae.dim <= _SMALL_WIDTH else {"dim": _SMALL_WIDTH, "num_heads": 2}
        )
        ffn_dim = min(vae.ffn_dim, 2 * _SMALL_WIDTH)
        return {
            "vae": dataclasses.replace(
                vae, **width, ffn_dim=ffn_dim, encoder_num_blocks=1, decoder_num_blocks=1
            )
        }

    def describe(self, config: ColaT) -> str:
        """Blocks x width."""
        vae = config.vae
        return f"VAE {vae.encoder_num_blocks} + {vae.decoder_num_blocks} x {vae.dim}"


class TextVAEFamily(_ColaFamily[VAERunConfig]):
    """Stage 1."""

    name = "vae"
    config = VAERunConfig
    summary = "stage 1: train the Text VAE"
    example = "configs/small/vae_quickstart.yaml"
    writes_text = False
    workloads = {"paper_stage1": ("vae.block_size=1", *_batch(8, 512))}  # noqa: RUF012 - read only, as all here

    def build(self, config: VAERunConfig) -> "Stage1Objective":
        """The VAE alone."""
        from cola_train.families.cola.stage1 import Stage1Objective
        from cola_train.models.text_vae import TextVAE

        return Stage1Objective(TextVAE(config.vae), config.objective, config.seed)

    def initial_values(
        self, config: VAERunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        """Drawn."""
        from cola_train.families.cola.start import vae_values

        return vae_values(config, None, shapes)

    def step_work(self, config: VAERunConfig, phase: str) -> "Parts":
        """Every step is alike."""
        from cola_train.families.cola.flops import stage1_work

        return stage1_work(config)

    def parameters(self, config: VAERunConfig) -> dict[str, int]:
        """The VAE's."""
        return dict(vae_parameters(config.vae))


class JointFamily(_ColaFamily[JointRunConfig]):
    """Stage 2."""

    name = "joint"
    config = JointRunConfig
    summary = "stage 2: train VAE and DiT jointly"
    example = "configs/small/joint_quickstart.yaml"
    stage1_key = "init_vae_from"
    workloads = {  # noqa: RUF012
        "S": (*_FROZEN_VAE, *_S, *_batch(8, 256)),
        "M": (*_FROZEN_VAE, *_M, *_batch(2, 512)),
        "paper_stage2": (
            "init_vae_from=random",
            "vae.block_size=1",
            "dit.block_size=16",
            "budget.nominal_parameters=1800000000",
            *_batch(8, 512),
        ),
    }
    generation_workloads = {"S": "S", "M": "M", "paper": "paper_stage2"}  # noqa: RUF012

    def build(self, config: JointRunConfig) -> "Stage2Objective":
        """VAE, DiT and reference encoder."""
        from cola_train.families.cola.stage2 import Stage2Objective
        from cola_train.models.dit import BlockCausalDiT
        from cola_train.models.text_vae import TextVAE

        return Stage2Objective(
            TextVAE(config.vae), BlockCausalDiT(config.dit), config.objective, config.seed
        )

    def initial_values(
        self, config: JointRunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        """Drawn, or read from the checkpoints that the config names; the reference encoder is the
        VAE's.
        """
        from cola_train.families.cola.start import dit_values, vae_values

        yield from vae_values(config, config.init_vae_from, shapes)
        yield from dit_values(config, shapes)

    def check_data(self, config: JointRunConfig, data: "PreparedData") -> None:
        """Also refuses checkpoints to start from whose networks or tokenizer are others."""
        from cola_train.families.cola.start import check_start

        super().check_data(config, data)
        check_start(config, data)

    def _block_size(self, config: JointRunConfig) -> int:
        return config.dit.block_size

    def _dit(self, config: JointRunConfig) -> DiTConfig:
        return config.dit

    def phases(self, config: JointRunConfig) -> Sequence[Phase]:
        """Interval goes through both; Fix is always frozen."""
        strategy = config.objective.vae_strategy
        if strategy.mode == "interval":
            return Phase(_JOINT, strategy.joint_steps), Phase(_FROZEN, strategy.frozen_steps)
        return (Phase(_JOINT if strategy.mode == "joint" else _FROZEN, 1),)

    def step_work(self, config: JointRunConfig, phase: str) -> "Parts":
        """In frozen phases the VAE only encodes."""
        from cola_train.families.cola.flops import stage2_work

        return stage2_work(config, phase == _JOINT)

    def parameters(self, config: JointRunConfig) -> dict[str, int]:
        """VAE and DiT; the frozen reference encoder is a copy and not among them."""
        return {**vae_parameters(config.vae), **dit_parameters(config.dit)}

    def backbone_parameters(self, config: JointRunConfig) -> int:
        """The DiT's."""
        return sum(dit_parameters(config.dit).values())

    def reference(
        self, run: TrainedRun[JointRunConfig], device: "str | torch.device"
    ) -> "ColaCheckpoint | None":
        """The VAE with the encoder that stage 2 started from, where reference_weight keeps one."""
        from cola_train.families.cola.export import in_memory, with_reference_encoder

        weights = with_reference_encoder(run.weights)
        if weights is None:
            return None
        return in_memory(run.config, None, weights, run.tokenizer, run.training, device)

    def shrink(self, config: JointRunConfig, num_steps: int) -> dict[str, Any]:
        """Also a narrow DiT of two layers. Nothing holds it to a first stage, and a VAE that would
        be fixed trains.
        """
        dit, objective = config.dit, config.objective
        width: dict[str, Any] = {}
        if dit.txt_dim > _SMALL_WIDTH:
            width = {
                "txt_dim": _SMALL_WIDTH,
                "emb_dim": _SMALL_WIDTH,
                "heads": 2,
                "head_dim": 16,
                "rope_dim": 8,
            }
        strategy = _short_strategy(objective.vae_strategy, num_steps)
        return super().shrink(config, num_steps) | {
            "dit": dataclasses.replace(dit, **width, num_layers=min(dit.num_layers, 2)),
            "init_vae_from": None,
            "init_dit_from": None,
            "objective": dataclasses.replace(
                objective, reference_weight=0.0, vae_strategy=strategy
            ),
        }

    def uncounted_start(self, config: JointRunConfig) -> str | None:
        """Stage 1."""
        return config.init_vae_from

    def match_target(self, config: JointRunConfig) -> MatchTarget:
        """The DiT's size."""
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
        return MatchTarget(
            config.dit.txt_dim, config.dit.num_layers, config.dit.head_dim, tuple(notes)
        )

    def describe(self, config: JointRunConfig) -> str:
        """Blocks x width of both networks."""
        return f"DiT {config.dit.num_layers} x {config.dit.txt_dim}, {super().describe(config)}"

    def growth_settings(self, config: JointRunConfig, size: str, value: int) -> tuple[str, ...]:
        """Of the DiT."""
        dit = config.dit
        if (
            value
            == {"block_size": dit.block_size, "layers": dit.num_layers, "width": dit.txt_dim}[size]
        ):
            return ()
        if size == "width":
            require(
                value % dit.head_dim == 0,
                f"widths must be multiples of the workload's head width, {dit.head_dim}, not "
                f"{value}.",
            )
            return (
                f"dit.txt_dim={value}",
                f"dit.emb_dim={value}",
                f"dit.heads={value // dit.head_dim}",
            )
        return (f"dit.block_size={value}" if size == "block_size" else f"dit.num_layers={value}",)


def _short_strategy(strategy: VAEStrategyConfig, num_steps: int) -> VAEStrategyConfig:
    cycle = max(2, num_steps // 6)
    share = strategy.joint_steps / (strategy.joint_steps + strategy.frozen_steps)
    joint = min(cycle - 1, max(1, round(cycle * share)))
    mode = "joint" if strategy.mode == "fix" else strategy.mode
    return dataclasses.replace(strategy, mode=mode, joint_steps=joint, frozen_steps=cycle - joint)

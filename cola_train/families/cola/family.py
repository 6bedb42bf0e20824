"""Cola DLM as a family: what its stages share, and stage 1."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cola_train.config.loop import AlarmsConfig
from cola_train.config.settings import require
from cola_train.families.cola.config import (
    ColaRunConfig,
    VAERunConfig,
)
from cola_train.families.cola.flops import vae_parameters, vae_work
from cola_train.families.cola.workloads import STAGE1
from cola_train.families.family import Family, TrainedRun
from cola_train.flops.work import Parts
from cola_train.models.config import DiTConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.data.prepared import PreparedData
    from cola_train.families.cola.checkpoint import ColaCheckpoint
    from cola_train.families.cola.stage1 import Stage1Objective

ColaT = TypeVar("ColaT", bound=ColaRunConfig)
_JOINT, _FROZEN = "joint", "frozen"
# For `cola-train chaos`.
SMALL_WIDTH = 32


class ColaFamily(Family[ColaT]):
    """What both stages share: a VAE, and the layout of their checkpoints."""

    has_latents = True

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
            ffn_dim=min(config.vae.ffn_dim, 2 * SMALL_WIDTH),
            encoder_num_blocks=1,
            decoder_num_blocks=1,
        )
        if vae.dim > SMALL_WIDTH:
            vae = dataclasses.replace(vae, dim=SMALL_WIDTH, num_heads=2)
        return {"vae": vae}

    def describe(self, config: ColaT) -> str:
        vae = config.vae
        return f"VAE {vae.encoder_num_blocks} + {vae.decoder_num_blocks} x {vae.dim}"


class TextVAEFamily(ColaFamily[VAERunConfig]):
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
        from cola_train.families.cola.start import vae_values

        return vae_values(config, None, shapes)

    def step_work(self, config: VAERunConfig, phase: str) -> Parts:
        return vae_work(config)

    def parameters(self, config: VAERunConfig) -> dict[str, int]:
        return dict(vae_parameters(config.vae))

"""The stages: which objective, over which networks, a config is of."""

from typing import Any

from torch import Tensor, nn

from cola_train.config.runs import AutoregressiveRunConfig, JointRunConfig, LLaDARunConfig, RunConfig, VAERunConfig
from cola_train.data.datamodule import Batch
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from cola_train.objectives.autoregressive import AutoregressiveObjective
from cola_train.objectives.losses import Losses
from cola_train.objectives.masked_diffusion import MaskedDiffusionObjective
from cola_train.objectives.stage1 import Stage1Objective
from cola_train.objectives.stage2 import Stage2Objective
from cola_train.training.module import StageModule


class TextVAEStage(StageModule):
    """Stage 1."""

    config: VAERunConfig

    def build_objective(self) -> nn.Module:
        """The VAE alone."""
        return Stage1Objective(TextVAE(self.config.vae), self.config.objective, self.config.seed)


class JointStage(StageModule):
    """Stage 2."""

    config: JointRunConfig

    def build_objective(self) -> nn.Module:
        """VAE, DiT and reference encoder."""
        config = self.config
        return Stage2Objective(TextVAE(config.vae), BlockCausalDiT(config.dit), config.objective, config.seed)

    def losses(self, batch: Batch, counts: dict[str, Tensor], step: int) -> Losses:
        """Stage 2's losses; the VAE strategy says whether the VAE takes part."""
        losses: Losses = self.objective(batch, counts, self.config.objective.vae_strategy.trains_vae(step))
        return losses

    @property
    def vae_learning_rate_factor(self) -> float:
        """See VAEStrategyConfig."""
        return self.config.objective.vae_strategy.learning_rate_factor


class AutoregressiveStage(StageModule):
    """The autoregressive baseline."""

    config: AutoregressiveRunConfig

    def build_objective(self) -> nn.Module:
        """A causal transformer."""
        config = self.config
        return AutoregressiveObjective(Transformer(config.transformer, causal=True), config.objective, config.seed)


class LLaDAStage(StageModule):
    """The masked diffusion baseline."""

    config: LLaDARunConfig

    def build_objective(self) -> nn.Module:
        """A transformer that sees the whole row."""
        config = self.config
        return MaskedDiffusionObjective(Transformer(config.transformer, causal=False), config.objective, config.seed)


_STAGES: dict[type[RunConfig], type[StageModule]] = {
    VAERunConfig: TextVAEStage,
    JointRunConfig: JointStage,
    AutoregressiveRunConfig: AutoregressiveStage,
    LLaDARunConfig: LLaDAStage,
}


def build_stage(config: RunConfig, **parts: Any) -> StageModule:
    """The stage that a config is of."""
    return _STAGES[type(config)](config, **parts)

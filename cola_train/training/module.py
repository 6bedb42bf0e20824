"""The two stages as Lightning modules: step = objective(batch), clip, optimise, log. No maths here.

Optimisation is by hand, so that one `training_step` is one optimizer step: its micro-batches share their means' denominators
(objectives/losses.py), a checkpoint never falls between micro-batches, and a bad loss is caught before it reaches the weights.
"""

import math

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cola_train.config.runs import JointRunConfig, RunConfig, VAERunConfig
from cola_train.config.settings import UserError
from cola_train.data.datamodule import Batch
from cola_train.hf_format import load_dit, load_vae
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.initialise import initialise_dit, initialise_text_vae
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.losses import DENOMINATORS, Losses, summarise
from cola_train.objectives.stage1 import Stage1Objective
from cola_train.objectives.stage2 import Stage2Objective
from cola_train.training.optim import build_optimizer, set_learning_rate
from cola_train.training.strategy import shard, sync_gradients_only_if


class StageModule(pl.LightningModule):
    """What both stages share. `last_metrics` holds the latest step's figures, for callbacks."""

    objective: nn.Module

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.last_metrics: dict[str, float] = {}
        self._validation_terms: list[Tensor] = []
        self._validation_names: list[str] = []
        self._validation_weights: dict[str, float] = {}

    def build_objective(self) -> nn.Module:
        """The objective with its networks, initialised or loaded."""
        raise NotImplementedError

    def losses(self, batch: Batch, counts: dict[str, Tensor], step: int) -> Losses:
        """The objective's losses in optimizer step `step`."""
        raise NotImplementedError

    @property
    def vae_learning_rate_factor(self) -> float:
        """The VAE's learning rate over the schedule's."""
        return 1.0

    def configure_model(self) -> None:
        """Build and shard, once (Lightning calls this again on resume)."""
        if hasattr(self, "objective"):
            return
        objective = self.build_objective().to(self.device)
        assert self.device_mesh is not None
        shard(objective, self.device_mesh["data_parallel"])
        self.objective = objective

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; the learning rate is set at each step."""
        return build_optimizer(self.objective, self.config.optim, self.vae_learning_rate_factor)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step over all of this process' rows."""
        step, optimizer = self.global_step, self.optimizers()
        assert not isinstance(optimizer, list)
        micro_batches = _split(batch, self.config.trainer.micro_batch_size)
        counts = self._global_counts(micro_batches)
        sums: dict[str, Tensor] = {}
        for number, micro_batch in enumerate(micro_batches, start=1):
            sync_gradients_only_if(self.objective, number == len(micro_batches))
            losses = self.losses(micro_batch, counts, step)
            # Gradients are averaged over processes; the losses are shares of one global mean, to be added.
            self.manual_backward(losses.total * self.trainer.world_size)
            for name, value in losses.figures().items():
                sums[name] = sums[name] + value if name in sums else value
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.optim.gradient_clip)
        figures = summarise(self._global_sums(sums), losses.weights)
        figures["gradient_norm"] = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self._refuse_non_finite(figures, step)
        figures["learning_rate"] = set_learning_rate(optimizer.optimizer, self.config.optim, step)
        optimizer.step()
        optimizer.zero_grad()
        self.last_metrics = figures

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._validation_terms, self._validation_names = [], []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up a batch's terms and counts; means are taken over the whole validation set at the end."""
        counts = self.objective.counts(batch)  # type: ignore[operator]  # both objectives have it
        ones = {name: torch.ones_like(value, dtype=torch.float32) for name, value in counts.items()}
        losses: Losses = self.objective(batch, ones)
        sums = {**losses.figures(), **{f"count/{name}": value.float() for name, value in counts.items()}}
        self._validation_weights = losses.weights
        self._validation_names = list(sums)
        self._validation_terms.append(torch.stack([value.float() for value in sums.values()]))

    def validation_metrics(self) -> dict[str, float]:
        """The means of the validation that just ended."""
        if not self._validation_terms:
            return {}
        total = torch.stack(self._validation_terms).double().sum(0)
        sums = dict(zip(self._validation_names, self.trainer.strategy.reduce(total, reduce_op="sum").tolist(), strict=True))
        counts = {name: max(sums[f"count/{count}"], 1) for name, count in DENOMINATORS.items() if name in sums}
        means = {name: sums[name] / count for name, count in counts.items()}
        return summarise(means, self._validation_weights)

    def _global_counts(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        per_batch = [self.objective.counts(batch) for batch in micro_batches]  # type: ignore[operator]  # as above
        names = list(per_batch[0])
        total = torch.stack([torch.stack([counts[name] for name in names]) for counts in per_batch]).sum(0)
        total = self.trainer.strategy.reduce(total, reduce_op="sum")
        return dict(zip(names, total.float(), strict=True))

    def _global_sums(self, terms: dict[str, Tensor]) -> dict[str, float]:
        total = self.trainer.strategy.reduce(torch.stack([value.float() for value in terms.values()]), reduce_op="sum")
        return dict(zip(terms, total.tolist(), strict=True))

    def _refuse_non_finite(self, figures: dict[str, float], step: int) -> None:
        bad = [f"{name} = {value}" for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise UserError(
                f"Optimizer step {step} is not finite ({', '.join(bad)}); the step was not taken, the last checkpoint is intact. "
                "Look at the metrics before it; a lower optim.learning_rate or trainer.precision=fp32 are the usual remedies."
            )


def _split(batch: Batch, rows: int) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(tensor.split(rows) for tensor in batch), strict=True)]


class TextVAEStage(StageModule):
    """Stage 1."""

    config: VAERunConfig

    def build_objective(self) -> nn.Module:
        """A new VAE."""
        vae = TextVAE(self.config.vae)
        initialise_text_vae(vae, self.config.seed)
        return Stage1Objective(vae, self.config.objective, self.config.seed)

    def losses(self, batch: Batch, counts: dict[str, Tensor], step: int) -> Losses:
        """Stage 1's losses."""
        losses: Losses = self.objective(batch, counts)
        return losses


class JointStage(StageModule):
    """Stage 2."""

    config: JointRunConfig

    def build_objective(self) -> nn.Module:
        """VAE and DiT, from checkpoints where the config names them, else new."""
        config = self.config
        vae, dit = TextVAE(config.vae), BlockCausalDiT(config.dit)
        if config.init_vae_from is None:
            initialise_text_vae(vae, config.seed)
        else:
            load_vae(config.init_vae_from, vae)
        if config.init_dit_from is None:
            initialise_dit(dit, config.seed)
        else:
            load_dit(config.init_dit_from, dit)
        return Stage2Objective(vae, dit, config.objective, config.seed)

    def losses(self, batch: Batch, counts: dict[str, Tensor], step: int) -> Losses:
        """Stage 2's losses; the VAE strategy says whether the VAE takes part."""
        losses: Losses = self.objective(batch, counts, self.config.objective.vae_strategy.trains_vae(step))
        return losses

    @property
    def vae_learning_rate_factor(self) -> float:
        """See VAEStrategyConfig."""
        return self.config.objective.vae_strategy.learning_rate_factor

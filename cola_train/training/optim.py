"""The optimizer over a run's networks, and the learning rate as a pure function of the step."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from cola_train.config.amounts import Amount
from cola_train.config.optim import OptimConfig
from cola_train.config.runs import RunConfig
from cola_train.config.settings import require
from cola_train.flops.steps import steps_to
from cola_train.training.muon import MuonWithAdamW, WholeMatrixMuon, muon_matrices


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, its horizons in steps."""

    config: OptimConfig
    warmup_steps: int
    decay_steps: int  # the final rate is reached after this many
    anneal_steps: int  # wsd: the last of them

    @classmethod
    def of(cls, config: RunConfig) -> "Schedule":
        """A run's, its horizons converted from tokens or EFLOPs by what its steps cost.

        Raises:
            UserError: horizons that do not fit into one another.
        """
        optim = config.optim
        warmup, decay, anneal = (
            steps_to(config, Amount.parse(getattr(optim, name), f"optim.{name}")) for name in ("warmup", "decay", "anneal")
        )
        require(warmup < decay and warmup + anneal <= decay,
                f"optim.warmup ({optim.warmup!r}, {warmup} steps) must end before optim.decay ({optim.decay!r}, {decay} steps)"
                + (f", and before the anneal ({optim.anneal!r}, {anneal} steps) begins." if anneal else "."))  # fmt: skip
        return cls(optim, warmup, decay, anneal)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0.

        Linear warm-up, then a cosine to `decay_steps`, or (wsd) the peak rate and a straight line over the last
        `anneal_steps`; constant from there on.
        """
        config = self.config
        if step < self.warmup_steps:
            done = step / self.warmup_steps
            return config.start_learning_rate + done * (config.learning_rate - config.start_learning_rate)
        begin = self.warmup_steps if config.schedule == "cosine" else self.decay_steps - self.anneal_steps
        done = min(1.0, max(0.0, (step - begin) / (self.decay_steps - begin)))
        left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
        return config.final_learning_rate + left * (config.learning_rate - config.final_learning_rate)


def build_optimizer(objective: nn.Module, config: OptimConfig, vae_learning_rate_factor: float) -> torch.optim.Optimizer:
    """The run's optimizer; groups have the factor of their network on the schedule as `learning_rate_factor`.

    AdamW for every parameter, or Muon for what `muon_matrices` names and AdamW for the rest. Weight decay applies to every
    parameter: the paper names no exemption.
    """
    matrices = muon_matrices(objective) if config.optimizer == "muon" else set()
    factors = {"vae": vae_learning_rate_factor, "dit": 1.0, "transformer": 1.0}
    by_muon: list[dict[str, Any]] = []
    by_adamw: list[dict[str, Any]] = []
    for network, factor in factors.items():
        trained = [(name, p) for name, p in objective.named_parameters() if name.startswith(f"{network}.") and p.requires_grad]
        for groups, whether in ((by_muon, True), (by_adamw, False)):
            parameters = [parameter for name, parameter in trained if (name in matrices) == whether]
            if parameters:
                groups.append({"params": parameters, "learning_rate_factor": factor})
    adamw = torch.optim.AdamW(
        by_adamw,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not by_muon:
        return adamw
    return MuonWithAdamW(WholeMatrixMuon(by_muon, config), adamw)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group to its factor on `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]


def ensure_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter, made now where it would make it at its first step.

    AdamW's moments and step count, or Muon's momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = (
                    {"momentum_buffer": torch.zeros_like(parameter)}
                    if "momentum" in group
                    else {
                        "step": torch.zeros((), device=parameter.device),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
                )
    return dict(optimizer.state)

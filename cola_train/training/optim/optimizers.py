"""The optimizer over a run's networks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cola_train.config.optim import OptimConfig
from cola_train.objectives.objective import Objective
from cola_train.training.optim.muon import MuonWithAdamW, WholeMatrixMuon, muon_matrices


def build_optimizer(objective: Objective, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW for every parameter, or Muon for what `muon_matrices` names and AdamW for the rest.

    Each group has its parameters' factor on the schedule as `learning_rate_factor`. Weight decay
    applies to every parameter: the paper names no exemption.
    """
    matrices = muon_matrices(objective) if config.optimizer == "muon" else set()
    by_muon, by_adamw = dict[float, list[Tensor]](), dict[float, list[Tensor]]()
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            groups = by_muon if name in matrices else by_adamw
            groups.setdefault(objective.learning_rate_factor(name), []).append(parameter)
    adamw = torch.optim.AdamW(
        _groups(by_adamw),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if not by_muon:
        return adamw
    return MuonWithAdamW(WholeMatrixMuon(_groups(by_muon), config), adamw)


def _groups(parameters: Mapping[float, list[Tensor]]) -> list[dict[str, Any]]:
    return [
        {"params": group, "learning_rate_factor": factor} for factor, group in parameters.items()
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate to its factor times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]


def ensure_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """What the optimizer keeps of each parameter, made now and not at its first step.

    AdamW's moments and step count, or Muon's momentum.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if optimizer.state[parameter]:
                continue
            if "momentum" in group:
                state = {"momentum_buffer": torch.zeros_like(parameter)}
            else:
                state = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            optimizer.state[parameter] = state
    return dict(optimizer.state)

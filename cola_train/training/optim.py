"""AdamW over the VAE's and the DiT's parameters, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor, nn

from cola_train.config.loop import OptimConfig


def learning_rate(config: OptimConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0: linear warm-up, cosine to decay_steps, then constant."""
    if step < config.warmup_steps:
        done = step / config.warmup_steps
        return config.start_learning_rate + done * (config.learning_rate - config.start_learning_rate)
    done = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return config.final_learning_rate + cosine * (config.learning_rate - config.final_learning_rate)


def build_optimizer(objective: nn.Module, config: OptimConfig, vae_learning_rate_factor: float) -> torch.optim.AdamW:
    """One AdamW; a group per network, each with the factor on the schedule as its `learning_rate_factor`.

    Weight decay applies to every parameter: the paper names no exemption.
    """
    factors = {"vae": vae_learning_rate_factor, "dit": 1.0}
    groups = []
    for network, factor in factors.items():
        parameters = [p for name, p in objective.named_parameters() if name.startswith(f"{network}.") and p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "learning_rate_factor": factor})
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> float:
    """Set every group to its rate at `step`; returns the DiT's (factor 1)."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]
    return rate


def ensure_state(optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """AdamW's moments and step count of each parameter, made now where it would make them at its first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
    return dict(optimizer.state)

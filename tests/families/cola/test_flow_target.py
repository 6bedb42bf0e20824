"""objective.flow.target=posterior: the same loss and gradient on average, with less noise."""

import dataclasses

import pytest
import torch
from torch import Tensor

from cola_train.families.cola.losses import FlowConfig, Stage2Config, VAEStrategyConfig
from cola_train.families.cola.stage2 import Stage2Objective
from tests.helpers.losses import losses_of
from tests.helpers.tiny import make_batch, random_tokens, tiny_dit, tiny_vae

SEEDS = 300


def losses_and_gradients(flow: FlowConfig) -> tuple[Tensor, Tensor]:
    """The flow's loss, and its gradient by the last layer's bias, for each of SEEDS runs' draws."""
    config = Stage2Config(flow=flow, vae_strategy=VAEStrategyConfig(mode="fix"))
    batch = make_batch(random_tokens(2, 16, seed=1), [0, 3])
    losses, gradients = [], []
    objective = Stage2Objective(tiny_vae(), tiny_dit(block_size=4), config, 0)
    bias = objective.dit.get_parameter("txt_out.proj.bias")
    for seed in range(SEEDS):
        objective.seed = seed
        loss = losses_of(objective, batch, step=0).terms["flow_mse"]
        (gradient,) = torch.autograd.grad(loss, bias)
        losses.append(loss.detach())
        gradients.append(gradient)
    return torch.stack(losses), torch.stack(gradients)


@pytest.mark.parametrize("copies", [1, 2])
def test_targets_agree_on_average_and_the_mean_has_less_noise(copies: int) -> None:
    # Near data nothing but noise is in z_1 - z_0.
    flow = FlowConfig(time_loc=-1.0, noise_copies=copies, prompt_block_prob=0.3)
    of_sample = losses_and_gradients(flow)
    of_mean = losses_and_gradients(dataclasses.replace(flow, target="posterior"))
    for one, other in zip(of_sample, of_mean, strict=True):
        difference = (one - other).view(SEEDS, -1)
        error = difference.std(0) / SEEDS**0.5
        assert (difference.mean(0).abs() < 5 * error).all()
    noise = [gradients.var(0).sum() for _, gradients in (of_sample, of_mean)]
    assert noise[1] < 0.8 * noise[0]

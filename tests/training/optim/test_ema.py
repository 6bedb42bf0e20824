"""The moving average against its definition: whose weights are in it, and how much of each."""

import pytest
import torch
from torch import nn

from cola_train.config.loop import EMAConfig
from cola_train.training.optim.ema import EMA


def share_of_initial_weights(config: EMAConfig, steps: int) -> float:
    """What is left in the average of weights that are 1 at first and 0 after every step."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.ones_(network.weight)
    ema = EMA(network, config)
    ema.start()
    nn.init.zeros_(network.weight)
    for step in range(steps):
        ema.update(step)
    return float(ema.tensors["weight"])


def test_initial_weights_are_forgotten() -> None:
    """With a constant decay they would be 0.9999^2500 = 78 % of it."""
    assert share_of_initial_weights(EMAConfig(decay=0.9999), 2500) < 1e-12
    constant = share_of_initial_weights(EMAConfig(decay=0.9999, warm_up=False), 2500)
    assert constant == pytest.approx(0.9999**2500, rel=1e-3)


def test_the_decay_rises_to_its_setting_and_stays_there() -> None:
    network = nn.Linear(1, 1, bias=False)
    ema = EMA(network, EMAConfig(decay=0.8))
    kept = []
    for step in (0, 1, 8, 34, 35, 36, 10**6):
        with torch.no_grad():
            ema.tensors["weight"].fill_(1.0)
            network.weight.zero_()
        ema.update(step)
        kept.append(float(ema.tensors["weight"]))
    assert kept == pytest.approx([1 / 10, 2 / 11, 9 / 18, 35 / 44, 0.8, 0.8, 0.8])

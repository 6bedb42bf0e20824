"""The networks and the flow loss against numbers written by the released code."""

import copy

import pytest
import torch
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola import stage1, stage2
from cola_train.families.cola.losses import FlowConfig, Stage2Config, VAEStrategyConfig
from cola_train.families.cola.stage2 import FlowDraws, Stage2Objective
from cola_train.flow import interpolate, velocity_target
from cola_train.models.modulation import Times
from cola_train.randomness import Purpose
from tests.helpers.compare import assert_near
from tests.helpers.golden import Golden
from tests.helpers.losses import losses_of

GRADIENT_PREFIX = "grad_norm/"


def times_of(train: dict[str, Tensor]) -> Times:
    pinned = train["t_positions"] == 0
    rows = torch.arange(len(train["t"]))[:, None].expand(pinned.shape)
    return Times(
        torch.cat([train["t"], torch.zeros(1)]), torch.where(pinned, len(train["t"]), rows)
    )


def test_posterior(golden: Golden) -> None:
    posterior = golden.checkpoint.vae.encode(golden.train["tokens"])
    assert_near(posterior.mean, golden.train["mean"])
    assert_near(posterior.logvar, golden.train["logvar"])
    assert_near(posterior.sample(golden.train["eps"]), golden.train["z_0"])


def test_decoder(golden: Golden) -> None:
    assert_near(golden.checkpoint.vae.decode(golden.train["mean"]), golden.train["logits"])


def test_path(golden: Golden) -> None:
    train = golden.train
    assert_near(
        interpolate(train["z_0"], train["z_1"], train["t_positions"][..., None]), train["z_t"], 1e-6
    )


def test_velocity(golden: Golden) -> None:
    train, dit = golden.train, golden.checkpoint.dit
    assert dit is not None
    velocity = dit.velocity(train["z_t"], train["z_0"], times_of(train))
    assert_near(velocity, train["velocity"])
    error = (velocity - velocity_target(train["z_0"], train["z_1"])).square().mean(-1)
    counted = train["loss_mask"]
    assert 0 < counted.sum() < counted.numel()
    assert_near((error * counted).sum() / counted.sum(), train["flow_loss"][0])


@pytest.mark.parametrize("mode", ["fix", "joint"])
def test_flow_loss_and_its_gradients(
    golden: Golden, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The objective itself, given the reference's draws in place of its own."""
    train, vae, dit = golden.train, *copy.deepcopy((golden.checkpoint.vae, golden.checkpoint.dit))
    assert dit is not None
    draws = {Purpose.POSTERIOR_EPS: train["eps"], Purpose.FLOW_NOISE: train["z_1"]}
    blocks = train["t_positions"].shape[1] // dit.config.block_size
    flow = FlowDraws(train["t"][:, None].expand(-1, blocks), train["t_positions"] == 0, None)
    for module in (stage1, stage2):
        monkeypatch.setattr(
            module, "standard_normal_latents", lambda seed, purpose, *_: draws[purpose]
        )
    monkeypatch.setattr(Stage2Objective, "_draws", lambda self, batch: flow)
    config = Stage2Config(
        mask_weight=0.0, flow=FlowConfig(), vae_strategy=VAEStrategyConfig(mode=mode)
    )  # type: ignore[arg-type]
    objective = Stage2Objective(vae, dit.requires_grad_(True), config, seed=0)
    tokens = train["tokens"]
    batch = Batch(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.zeros_like(tokens),
        torch.arange(len(tokens)),
        torch.arange(len(tokens)),
    )

    flow_mse = losses_of(objective, batch, step=0).terms["flow_mse"]
    flow_mse.backward()

    assert_near(flow_mse, train["flow_loss"][0])
    expected = {
        name.removeprefix(GRADIENT_PREFIX): norm
        for name, norm in train.items()
        if name.startswith(GRADIENT_PREFIX)
    }
    assert len(expected) == 9
    for name, norm in expected.items():
        gradient = dit.get_parameter(name).grad
        assert gradient is not None
        torch.testing.assert_close(gradient.norm(), norm.squeeze(), rtol=1e-5, atol=0)

"""fp8 by emulation on a CPU: losses against bf16's, the names and layers that it touches; and where
it is refused.
"""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cola_train.config.loop import TrainerConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.run_layout import folder_of
from cola_train.scaling import memory
from cola_train.scaling.allocations import MemoryPart, Timeline
from cola_train.training import preflight
from cola_train.training.parallel import build
from cola_train.training.parallel.blocks import check_precision, multiply_in_fp8
from cola_train.training.run import train
from tests.helpers.runs import figures
from tests.helpers.tiny import tiny_dit, tiny_vae

STEPS = 30
needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


class BothNetworks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vae, self.dit = tiny_vae(dim=32), tiny_dit()


@needs_torchao
def test_layers_of_blocks_multiply_in_fp8_under_the_same_names() -> None:
    objective = BothNetworks()
    before = dict(objective.named_parameters())
    multiply_in_fp8(objective, emulate=True)
    after = dict(objective.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    replaced = {
        name for name, layer in objective.named_modules() if type(layer).__name__ == "Float8Linear"
    }
    in_dit = {"msa.proj_qkv", "msa.proj_out", "mlp.proj_in", "mlp.proj_out"}
    assert {name for name in replaced if name.startswith("dit")} == {
        f"dit.blocks.{block}.{name}" for block in range(2) for name in in_dit
    }
    # The feed-forward is 24 wide, and its second layer takes half of that: no multiples of 16.
    in_vae = {"qkv_proj", "attn_out_proj"}
    assert {name for name in replaced if name.startswith("vae.encoder")} == {
        f"vae.encoder.blocks.{block}.{name}" for block in range(2) for name in in_vae
    }


@needs_torchao
def test_a_layer_rounds_to_fp8_forward_and_backward() -> None:
    torch.manual_seed(0)
    plain, rounded = tiny_dit(), tiny_dit()
    multiply_in_fp8(rounded, emulate=True)
    x = torch.randn(32, 16)
    results = []
    for network in (plain, rounded):
        layer = network.get_submodule("blocks.0.mlp.proj_in")
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)))
        results.append((out.detach(), inputs.grad, layer.weight.grad))
    # e4m3 has 3 bits of mantissa and e5m2, for gradients, 2: rounding by 2^-4 and 2^-3 at most, and
    # less on the whole.
    for expected, found in zip(*results, strict=True):
        difference = float((found - expected).norm() / expected.norm())
        assert 1e-3 < difference < 2**-3


@needs_torchao
def test_a_run_in_fp8_learns_as_one_in_bf16(
    joint_config: Callable[..., JointRunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_precision", lambda config: None)
    monkeypatch.setattr(build, "multiply_in_fp8", functools.partial(multiply_in_fp8, emulate=True))
    settings = [
        f"trainer.max_steps={STEPS}",
        "optim.decay=60",
        "trainer.accelerator=auto",  # fp8 is not for "cpu"; it is emulated here
        "checkpoint.every_steps=100",
        "trainer.validate_every_steps=30",
    ]
    bf16, fp8 = (
        joint_config(name, f"trainer.precision={name}", *settings) for name in ("bf16", "fp8")
    )
    train(bf16)
    train(fp8)
    expected, found = figures(folder_of(bf16)), figures(folder_of(fp8))
    losses = [key for key in expected if key[1].endswith("/loss")]
    assert len(losses) == STEPS + 1
    differences = [abs(found[key] / expected[key] - 1) for key in losses]  # type: ignore[operator]
    learnt = expected[1, "train/loss"] - expected[STEPS, "train/loss"]  # type: ignore[operator]
    assert 0 < max(differences) < 2e-3
    assert learnt > 0.1 * expected[1, "train/loss"]  # type: ignore[operator]


@needs_torchao
def test_networks_without_a_fit_layer(vae_config: Callable[..., VAERunConfig]) -> None:
    with pytest.raises(
        UserError,
        match=r"fp8 would change nothing: no linear layer of a block has multiples of 16 inputs",
    ):
        multiply_in_fp8(tiny_vae(dim=8, num_heads=1))


def test_memory_is_planned_as_bf16s(
    vae_config: Callable[..., VAERunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []

    def record(config: VAERunConfig, *rest: Any) -> list[Timeline]:
        recorded.append(config.trainer.precision)
        nothing = np.zeros((1, len(MemoryPart)), dtype=np.int64)
        return [Timeline(nothing, nothing)]

    monkeypatch.setattr(memory, "record", record)
    monkeypatch.setattr(memory, "_recorded", {})
    memory.estimate(vae_config("x", "trainer.precision=fp8", "trainer.accelerator=auto"), 1)
    assert recorded == ["bf16"]


@pytest.mark.parametrize(
    "installed, capability, message",
    [
        (
            False,
            (9, 0),
            (
                r"fp8 needs torchao, which is not installed: pip install 'cola-train\[fp8\]', or "
                r"use bf16"
            ),
        ),
        (
            True,
            None,
            r"capability 8\.9 or newer, such as an H100\), not a CPU; use trainer\.precision=bf16",
        ),
        (True, (8, 0), r"not A100 of capability 8\.0; use trainer\.precision=bf16"),
        (True, (8, 9), None),
    ],
)
def test_where_fp8_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
    installed: bool,
    capability: tuple[int, int] | None,
    message: str | None,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    if message is None:
        check_precision(TrainerConfig(precision="fp8"))
        return
    with pytest.raises(UserError, match=message):
        check_precision(TrainerConfig(precision="fp8"))


def test_a_run_that_cannot_be_in_fp8_leaves_nothing(
    vae_config: Callable[..., VAERunConfig], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"trainer\.precision=fp8 needs"):
        train(vae_config("x", "trainer.precision=fp8"))
    assert not (tmp_path / "x").exists()

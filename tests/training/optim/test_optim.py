"""The learning rate as a pure function of the step, its horizons in any unit; Muon against torch's
own and against an SVD.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from cola_train.config.amounts import FLOPS_PER_EFLOP
from cola_train.config.load import to_yaml
from cola_train.config.optim import OptimConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.cola.losses import Stage2Config, VAEStrategyConfig
from cola_train.families.cola.stage2 import Stage2Objective
from cola_train.families.costs import flops_after
from cola_train.run_layout import folder_of
from cola_train.training.optim import optimizers
from cola_train.training.optim.optimizers import (
    build_optimizer,
    ensure_state,
    muon_matrices,
    orthogonalized,
    set_learning_rate,
)
from cola_train.training.optim.schedule import Schedule
from cola_train.training.run import train
from tests.helpers.programs import as_torchrun
from tests.helpers.runs import figures, saved_tensors
from tests.helpers.tiny import tiny_dit, tiny_vae

PAPER = Schedule(OptimConfig(), 5000, 1_000_000, 0)
STABLE = Schedule(OptimConfig(schedule="wsd", anneal="200"), 100, 1000, 200)


def test_the_papers_schedule_at_its_corners() -> None:
    assert PAPER.rate(0) == pytest.approx(1e-6)
    assert PAPER.rate(2500) == pytest.approx((1e-6 + 1.5e-4) / 2)
    assert PAPER.rate(5000) == pytest.approx(1.5e-4)
    assert PAPER.rate(502_500) == pytest.approx((1.5e-4 + 1e-5) / 2)
    assert PAPER.rate(1_000_000) == pytest.approx(1e-5)
    assert PAPER.rate(5_000_000) == pytest.approx(1e-5)


@given(st.integers(0, 1_000_000))
def test_it_rises_then_falls_without_a_jump(step: int) -> None:
    here, after = PAPER.rate(step), PAPER.rate(step + 1)
    assert (after > here) if step < 5000 else (after <= here)
    steepest = max(1.5e-4 / 5000, math.pi * 1.5e-4 / 2 / 995_000)
    assert abs(after - here) <= steepest * 1.001


def test_warmup_stable_decay_is_constant_between_and_straight_at_the_end() -> None:
    assert STABLE.rate(50) == pytest.approx((1e-6 + 1.5e-4) / 2)
    assert {STABLE.rate(step) for step in range(100, 801)} == {1.5e-4}
    assert STABLE.rate(900) == pytest.approx((1.5e-4 + 1e-5) / 2)
    assert STABLE.rate(1000) == STABLE.rate(2000) == pytest.approx(1e-5)


def test_horizons_in_tokens_and_eflops_become_the_steps_that_reach_them(
    joint_config: Callable[..., JointRunConfig],
) -> None:
    cost = flops_after(joint_config("x"), 30)["model"] / FLOPS_PER_EFLOP
    config = joint_config(
        "x", f"optim.warmup='{7 * 4 * 32} tokens'", f"optim.decay='{cost!r} EFLOPs'"
    )
    assert Schedule.of(config) == Schedule(config.optim, 7, 30, 0)
    # A token more needs another step.
    assert (
        Schedule.of(
            joint_config("x", f"optim.warmup='{7 * 4 * 32 + 1} tokens'", "optim.decay=9")
        ).warmup_steps
        == 8
    )


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["optim.warmup=30", "optim.decay=30"],
            r"optim.warmup \('30', 30 steps\) must end before optim.decay \('30', 30 steps\)",
        ),
        (
            ["optim.schedule=wsd", "optim.anneal=29", "optim.decay=30"],
            r"before the anneal \('29', 29 steps\) begins",
        ),
        (["optim.anneal=3"], "optim.anneal is the last part of optim.schedule=wsd"),
        (["optim.schedule=wsd"], "needs it, as it needs an anneal above 0"),
        (
            ["optim.decay='1 EFLOPs'", "budget.convention=executed"],
            "cannot be EFLOPs with budget.convention=executed",
        ),
        (["optim.decay=later"], "optim.decay must be an amount"),
    ],
)
def test_horizons_that_do_not_fit_are_refused(
    joint_config: Callable[..., JointRunConfig], overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Schedule.of(joint_config("x", *overrides))


# Muon.


def both_networks(factor: float = 1.0) -> Stage2Objective:
    config = Stage2Config(
        reference_weight=0, vae_strategy=VAEStrategyConfig(learning_rate_factor=factor)
    )
    return Stage2Objective(tiny_vae(), tiny_dit(), config, seed=1)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))
def test_an_orthogonal_update_has_the_matrix_directions_and_no_sizes(
    rows: int, columns: int, seed: int
) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    within = u.T @ orthogonalized(matrix, 5).float() @ v.T
    kept = sizes > 0.05 * sizes[0]  # five iterations lift what is smaller only part of the way
    assert within.diagonal()[kept].min() > 0.5
    assert within.diagonal().max() < 1.3
    assert (within - within.diagonal().diag()).norm() < 0.1 * within.norm()


def test_products_in_fp32_give_the_same_update_without_bf16s_errors() -> None:
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
    exact = orthogonalized(matrix.double(), 5, torch.float64)
    assert_close(orthogonalized(matrix, 5, torch.float32).double(), exact, rtol=0, atol=1e-5)
    assert_close(orthogonalized(matrix, 5).double(), exact, rtol=0, atol=0.03)


@pytest.mark.parametrize("precision, products", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrices_are_multiplied_in_the_runs_precision(
    vae_config: Callable[..., VAERunConfig],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    products: torch.dtype,
) -> None:
    """On a CPU that emulates bf16, Muon took 20 times as long as the rest of an fp32 run's step."""
    used = set()

    def recording(matrix: Tensor, iterations: int, products: torch.dtype) -> Tensor:
        used.add(products)
        return orthogonalized(matrix, iterations, products)

    monkeypatch.setattr(optimizers, "orthogonalized", recording)
    steps = ["trainer.max_steps=1", "trainer.validate_every_steps=0"]
    train(vae_config("x", "optim.optimizer=muon", f"trainer.precision={precision}", *steps))
    assert used == {products}


def test_muon_is_for_the_matrices_inside_blocks() -> None:
    names = muon_matrices(both_networks())
    in_dit = {"msa.proj_qkv", "msa.proj_out", "mlp.proj_in", "mlp.proj_out"}
    in_vae = {"qkv_proj", "attn_out_proj", "ffn_proj", "ffn_out"}
    assert {name for name in names if name.startswith("dit.")} == {
        f"dit.blocks.{layer}.{name}.weight" for layer in range(2) for name in in_dit
    }
    assert {name for name in names if name.startswith("vae.encoder.")} == {
        f"vae.encoder.blocks.{layer}.{name}.weight" for layer in range(2) for name in in_vae
    }
    assert len(names) == 3 * 2 * 4


def matrices_of(name: str) -> int:
    """How many matrices a parameter holds, by what the forward passes cut its outputs into."""
    fused = {"qkv_proj": 3, "proj_qkv": 3, "ffn_proj": 2}
    return next((count for layer, count in fused.items() if f"{layer}.weight" in name), 1)


def test_fused_matrices_are_counted_as_what_they_are() -> None:
    counts = muon_matrices(both_networks())
    assert {name: matrices_of(name) for name in counts} == counts
    assert set(counts.values()) == {1, 2, 3}


def test_q_k_and_v_move_as_far_whatever_their_gradients_sizes() -> None:
    """A fused matrix's largest singular values would be v's, and q and k would hardly move."""
    objective = both_networks()
    weight = objective.dit.blocks[0].msa.proj_qkv.weight
    alone = [nn.Parameter(part.clone()) for part in weight.detach().chunk(3)]
    begin = weight.detach().clone()
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    for part, scale in zip(gradient.chunk(3), (0.03, 0.03, 1.0), strict=True):
        part *= scale
    weight.grad = gradient
    for one, part in zip(alone, gradient.chunk(3), strict=True):
        one.grad = part.clone()
    optimizer = build_optimizer(objective, OptimConfig(optimizer="muon", weight_decay=0.1))
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    torch.optim.Muon(alone, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    assert torch.equal(weight, torch.cat(alone))
    moved = weight.detach() - begin * (1 - 1e-3)
    q, k, v = (float(part.square().mean().sqrt()) for part in moved.chunk(3))
    assert [q, k] == pytest.approx([v, v], rel=0.05)


def test_both_optimizers_as_one_move_as_torchs_own_two_do() -> None:
    ours, theirs = both_networks(0.5), both_networks()
    config = OptimConfig(optimizer="muon", weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    matrices = muon_matrices(theirs)
    parts: list[tuple[float, torch.optim.Optimizer]] = []
    apart: list[tuple[nn.Parameter, list[nn.Parameter]]] = []  # views of a parameter's matrices
    for network, factor in (("vae.", 0.5), ("dit.", 1.0)):
        of_network = [
            (name, parameter)
            for name, parameter in theirs.named_parameters()
            if name.startswith(network)
        ]
        rest = [p for name, p in of_network if name not in matrices]
        views = [
            (p, [nn.Parameter(part) for part in p.data.chunk(matrices_of(name))])
            for name, p in of_network
            if name in matrices
        ]
        apart += views
        alone = [view for _, of in views for view in of]
        parts.append(
            (
                factor,
                torch.optim.Muon(
                    alone, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
                ),
            )
        )
        parts.append(
            (factor, torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.1, fused=True))
        )
    begin = [parameter.detach().clone() for parameter in ours.parameters()]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for whole, of in apart:
            assert whole.grad is not None
            for view, gradient in zip(of, whole.grad.chunk(len(of)), strict=True):
                view.grad = gradient
        set_learning_rate(optimizer, 1e-2 * (step + 1))
        optimizer.step()
        for factor, part in parts:
            for group in part.param_groups:
                group["lr"] = 1e-2 * (step + 1) * factor
            part.step()
    optimizer.zero_grad()
    for (name, one), other, before in zip(
        ours.named_parameters(), theirs.parameters(), begin, strict=True
    ):
        assert torch.equal(one, other), name
        assert not torch.equal(one, before), name
        assert one.grad is None


def test_muon_keeps_one_tensor_where_adamw_keeps_two() -> None:
    objective = both_networks()
    matrices = muon_matrices(objective)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    for parameter, kept in ensure_state(
        build_optimizer(objective, OptimConfig(optimizer="muon"))
    ).items():
        expected = (
            {"momentum_buffer"}
            if names[parameter] in matrices
            else {"step", "exp_avg", "exp_avg_sq"}
        )
        assert kept.keys() == expected, names[parameter]


def test_a_run_with_muon_is_the_same_on_two_processes_and_after_resuming(
    vae_config: Callable[..., VAERunConfig], tmp_path: Path
) -> None:
    # Every matrix is in two parts, and each process has one of them.
    muon = [
        "optim.optimizer=muon",
        "optim.learning_rate=1e-2",
        "vae.ffn_dim=10",
        "trainer.validate_every_steps=0",
    ]
    whole, part = vae_config("whole", *muon), vae_config("part", *muon, "trainer.max_steps=3")
    train(whole)
    train(part)
    train(vae_config("part", *muon))
    tensors, resumed = saved_tensors(folder_of(whole), 6), saved_tensors(folder_of(part), 6)
    assert any(name.startswith("momentum_buffer.") for name in tensors)
    assert tensors.keys() == resumed.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], resumed[name])] == []
    sharded = vae_config("sharded", *muon, "trainer.micro_batch_size=2")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "config.yaml").write_text(to_yaml(sharded), encoding="utf-8")
    done = as_torchrun(2, "tests.training.worker", str(tmp_path / "configs"))
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = figures(folder_of(whole)), figures(folder_of(sharded))
    assert found == pytest.approx(expected, rel=2e-4, abs=2e-5)
    losses = [key for key in expected if key[1].endswith("/loss")]
    assert len(losses) >= 6
    assert max(abs(found[key] / expected[key] - 1) for key in losses) < 1e-5  # type: ignore[operator]


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.optimizer=sgd", "'optim.optimizer'.*sgd.*muon"),
        ("optim.muon_momentum=1.0", r"optim.muon_momentum must be in \[0, 1\), not 1.0"),
        ("optim.muon_iterations=0", r"optim.muon_iterations must be in \[1, 99\], not 0"),
    ],
)
def test_what_muon_refuses(
    vae_config: Callable[..., VAERunConfig], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        vae_config("x", override)

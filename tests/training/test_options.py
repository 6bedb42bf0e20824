"""What may be switched on without changing the numbers (or, for bf16, changing them by its
rounding), and the moving average.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.families.cola.stage2 import Stage2Objective
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import total_loss
from cola_train.run_layout import folder_of
from cola_train.training.checkpoints.folder import saved_steps
from cola_train.training.parallel.blocks import checkpoint_activations
from cola_train.training.preflight import with_precision
from cola_train.training.run import export_run, train
from tests.helpers.initial import initialize_dit, initialize_text_vae
from tests.helpers.runs import figures, saved_tensors

JointConfigs = Callable[..., JointRunConfig]


def saved(config: RunConfig, step: int) -> dict[str, Tensor]:
    return saved_tensors(folder_of(config), step)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    "option",
    [
        "parallel.activation_checkpointing=selective",
        "parallel.activation_checkpointing=full",
        "parallel.cpu_offload=true",
        "checkpoint.asynchronous=true",
        "data.num_workers=2",
    ],
)
def test_what_changes_no_number(joint_config: JointConfigs, option: str) -> None:
    plain, with_option = joint_config("plain"), joint_config("with", option)
    train(plain)
    train(with_option)
    ours, theirs = (figures(folder_of(config)) for config in (plain, with_option))
    # What is computed again is executed, and counted: that is the one figure it changes.
    counted = {key for key in ours if key[1] == "eflops_executed"}
    assert all(ours[key] <= theirs[key] for key in counted)  # type: ignore[operator]
    assert any(ours[key] < theirs[key] for key in counted) == option.endswith("=full")  # type: ignore[operator]
    assert {key: ours[key] for key in ours.keys() - counted} == {
        key: theirs[key] for key in theirs.keys() - counted
    }
    for step in (3, 6):
        assert_equal(saved(plain, step), saved(with_option, step))


def test_background_saves_resume_exactly_and_leave_nothing_behind(
    joint_config: JointConfigs,
) -> None:
    often = [
        "checkpoint.asynchronous=true",
        "checkpoint.every_steps=1",
        "checkpoint.keep=3",
        "ema.decay=0.9",
    ]
    whole, part = joint_config("whole", *often), joint_config("part", *often, "trainer.max_steps=4")
    train(whole)
    train(part)
    train(joint_config("part", *often))
    assert saved_steps(folder_of(part)) == [4, 5, 6]
    for step in (4, 5, 6):
        assert_equal(saved(whole, step), saved(part, step))
    assert not list((folder_of(part) / "lightning").glob(".*"))


class Made(TorchDispatchMode):
    """Notes every storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def kept(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def kept_bytes(objective: nn.Module, run: Callable[[], Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Bytes that live from the forward to the backward pass, and the gradients."""
    objective.zero_grad()
    with Made() as made:
        loss = run()
    kept = made.kept()
    loss.backward()
    return kept, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def test_activation_checkpointing_keeps_less_and_gives_the_same_gradients(
    joint_config: JointConfigs, six_rows: Any
) -> None:
    # Deep and wide enough that blocks are most of what is kept.
    config = joint_config(
        "x",
        "dit.num_layers=6",
        "dit.txt_dim=64",
        "dit.emb_dim=64",
        "dit.head_dim=32",
        "dit.rope_dim=8",
        "vae.encoder_num_blocks=4",
        "vae.decoder_num_blocks=4",
    )
    results = {}
    for mode in ("none", "selective", "full"):
        vae, dit = TextVAE(config.vae), BlockCausalDiT(config.dit)
        initialize_text_vae(vae, 1)
        initialize_dit(dit, 1)
        for parameter in dit.parameters():
            if not parameter.any():
                nn.init.normal_(
                    parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel())
                )
        objective = Stage2Objective(vae, dit, config.objective, seed=3)
        checkpoint_activations(objective, mode)  # type: ignore[arg-type]  # the three modes
        counts = {name: value.float() for name, value in objective.counts(six_rows).items()}
        results[mode] = kept_bytes(
            objective,
            lambda objective=objective, counts=counts: total_loss(objective(six_rows), counts),
        )
    assert results["none"][0] > 1.3 * results["selective"][0] > 1.3 * 1.3 * results["full"][0]
    for mode in ("selective", "full"):
        assert_equal(results[mode][1], results["none"][1])


def test_bf16_rounds_the_forward_and_keeps_fp32_masters(joint_config: JointConfigs) -> None:
    exact, rounded = joint_config("exact"), joint_config("rounded", "trainer.precision=bf16")
    train(exact)
    train(rounded)
    assert all(tensor.dtype == torch.float32 for tensor in saved(rounded, 6).values())
    expected, found = figures(folder_of(exact)), figures(folder_of(rounded))
    differences = {
        key: abs(found[key] - value) / abs(value)
        for key, value in expected.items()
        if key[1].endswith("/loss")
    }
    assert 0 < max(differences.values()) < 2e-2
    # Learning rates of 1e-6 would vanish in bf16 weights.
    weights = [value for name, value in saved(rounded, 6).items() if name.startswith("model.")]
    assert sum(not torch.equal(value, value.bfloat16().float()) for value in weights) > 20


def test_initial_weights_are_those_of_plain_networks(joint_config: JointConfigs) -> None:
    config = joint_config(
        "run", "trainer.max_steps=1", "optim.start_learning_rate=1e-30", "optim.weight_decay=0"
    )
    train(config)
    vae, dit = TextVAE(config.vae), BlockCausalDiT(config.dit)
    initialize_text_vae(vae, config.seed)
    initialize_dit(dit, config.seed)
    found = saved(config, 1)
    for network, name in ((vae, "vae"), (dit, "dit")):
        for key, value in network.state_dict().items():
            assert torch.allclose(found[f"model.{name}.{key}"], value, atol=1e-28, rtol=0), key


def test_the_average_is_what_its_formula_says_and_is_validated_and_exported(
    joint_config: JointConfigs, tmp_path: Path
) -> None:
    every = ["checkpoint.every_steps=1", "checkpoint.keep=10", "trainer.validate_every_steps=1"]
    config = joint_config("run", "ema.decay=0.5", "ema.evaluate=true", "ema.export=true", *every)
    plain = joint_config("plain", *every)
    train(config)
    train(plain)
    name = "dit.blocks.0.mlp.proj_in.weight"
    average = saved(config, 1)[f"average.{name}"]
    # Of the warm-up (1 + n) / (10 + n), which is 1/2 after 8 steps.
    for step, decay in enumerate((2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15), start=2):
        tensors = saved(config, step)
        average = decay * average + (1 - decay) * tensors[f"model.{name}"]
        assert torch.allclose(tensors[f"average.{name}"], average, rtol=1e-6, atol=1e-8)
        # Averaging is looking on: the weights themselves are a plain run's.
        assert torch.equal(tensors[f"model.{name}"], saved(plain, step)[f"model.{name}"])
    assert figures(folder_of(config))[6, "train/loss"] == figures(folder_of(plain))[6, "train/loss"]
    assert (
        figures(folder_of(config))[6, "validation/loss"]
        != figures(folder_of(plain))[6, "validation/loss"]
    )
    exported = load_file(folder_of(config) / "hf" / "cola_dlm" / "cola_dit" / "model.safetensors")
    assert torch.equal(exported[name.removeprefix("dit.")], saved(config, 6)[f"average.{name}"])
    raw = export_run(folder_of(config), 6, tmp_path / "raw", 10**9)
    assert torch.equal(
        load_file(raw / "cola_dlm" / "cola_dit" / "model.safetensors")[name.removeprefix("dit.")],
        saved(config, 6)[f"model.{name}"],
    )
    with pytest.raises(
        UserError, match=r"has no moving average of the weights; only a run with ema\.decay"
    ):
        export_run(folder_of(plain), None, tmp_path / "none", 10**9, use_ema=True)


def test_what_an_average_needs_is_said(vae_config: Callable[..., VAERunConfig]) -> None:
    with pytest.raises(
        UserError, match=r"ema.evaluate and ema.export need an average: set ema.decay"
    ):
        vae_config("x", "ema.export=true")
    with pytest.raises(UserError, match=r"ema.decay must be in \[0, 1\), not 1"):
        vae_config("x", "ema.decay=1.0")


@pytest.mark.parametrize("phase", ["fix", "frozen"])
def test_bf16_accumulates_over_a_vae_that_only_encodes(
    joint_config: JointConfigs, vae_config: Callable[..., VAERunConfig], phase: str
) -> None:
    bf16 = ["trainer.precision=bf16", "trainer.micro_batch_size=2"]
    if phase == "fix":
        vae = vae_config("vae", "trainer.max_steps=1")
        train(vae)
        config = joint_config(
            "run", *bf16, f"init_vae_from={folder_of(vae)}", "objective.vae_strategy.mode=fix"
        )
        assert train(config).state == "finished"
        return
    interval = [
        "objective.vae_strategy.mode=interval",
        "objective.vae_strategy.joint_steps=2",
        "objective.vae_strategy.frozen_steps=2",
    ]
    # Going on after step 3, a process begins in the frozen phase.
    train(joint_config("part", *bf16, *interval, "trainer.max_steps=3"))
    train(joint_config("part", *bf16, *interval))
    whole = joint_config("whole", *bf16, *interval)
    train(whole)
    assert figures(folder_of(whole)) == figures(folder_of(joint_config("part")))


@pytest.mark.parametrize(
    "has, precision",
    [([], "fp32"), (["avx512_bf16"], "fp32"), (["avx512_bf16", "amx_bf16"], "bf16")],
)
def test_auto_is_bf16_where_a_cpu_multiplies_faster_in_it(
    vae_config: Callable[..., VAERunConfig],
    monkeypatch: pytest.MonkeyPatch,
    has: list[str],
    precision: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(has, True))
    config = with_precision(vae_config("x", "trainer.precision=auto"), None)
    assert config.trainer.precision == precision

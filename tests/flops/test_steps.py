"""The ledger of a training step against torch's own counter, to the last FLOP."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cola_train.config.load import load_config
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.config import DistillRunConfig
from cola_train.families.costs import step_flops, step_parts
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import total_loss
from tests.flops.counting import (
    build_objective,
    count_step,
    counter,
    run_config,
    total,
    training_batch,
)
from tests.helpers.runs import SMALL, SMALL_DIT
from tests.helpers.tiny import tiny_tokenizer

WITH_MASKS = "objective.mask_documents=true"
CODEBOOK = ["dit.head=codebook", "dit.vocab_size=320", "objective.vae_strategy.mode=fix"]
STAGE1 = {
    "plain": [],
    "no masked copies": ["objective.mask_weight=0"],
    "documents": [WITH_MASKS],
    "patches": ["vae.patch_size=2", "objective.mask_ratio=0.3"],
    "blocks": ["vae.block_size=4"],
    "deep": [
        "vae.encoder_num_blocks=3",
        "vae.decoder_num_blocks=2",
        "vae.dim=24",
        "vae.ffn_dim=20",
    ],
    "pre-norm": ["vae.post_norm=false", "vae.decoder_num_blocks=2"],
    "fixed variance": ["objective.fixed_log_snr=1.0"],
    "micro-batches": ["trainer.micro_batch_size=1"],
}
STAGE2 = {
    "joint": [],
    "x0.01": ["objective.vae_strategy.learning_rate_factor=0.01"],
    "fix": ["objective.vae_strategy.mode=fix"],
    "all scratch": ["init_vae_from=null", "objective.reference_weight=0"],
    "interval": ["objective.vae_strategy.mode=interval", "objective.vae_strategy.joint_steps=2"],
    "documents": [WITH_MASKS],
    "no reference": ["objective.reference_weight=0"],
    "no masked copies": ["objective.mask_weight=0"],
    "no encoder gradient": ["objective.flow.grad_to_encoder=false"],
    "a time a block": ["objective.flow.timestep_per=block", "trainer.micro_batch_size=2"],
    "noise copies": ["objective.flow.noise_copies=3", "objective.flow.timestep_per=block"],
    "history dropout": ["objective.flow.history_dropout=0.5"],
    "patches": ["vae.patch_size=2", "trainer.micro_batch_size=1"],
    "vae blocks": ["vae.block_size=2"],
    "one block a row": ["dit.block_size=32"],
    "codebook": [*CODEBOOK, "objective.flow.noise_copies=2"],
    "embedded codes": [*CODEBOOK, "dit.embeds_codes=true"],
    "deep": [
        "dit.num_layers=3",
        "dit.txt_dim=24",
        "dit.emb_dim=24",
        "dit.expand_ratio=3",
        "vae.encoder_num_blocks=2",
    ],
}
BASELINES = {
    "plain": [],
    "documents": [WITH_MASKS],
    "micro-batches": ["trainer.micro_batch_size=1"],
}
CASES = [
    pytest.param(stage, overrides, checkpointing, id=f"{stage}, {name}, {checkpointing}")
    for stage, cases in {
        "vae": STAGE1,
        "joint": STAGE2,
        "ar": BASELINES,
        "llada": BASELINES,
    }.items()
    for (name, overrides), checkpointing in itertools.product(
        cases.items(), ("none", "selective", "full")
    )
]


@pytest.mark.parametrize("stage, overrides, checkpointing", CASES)
def test_executed_is_what_torch_counts(
    stage: str, overrides: list[str], checkpointing: str
) -> None:
    config = run_config(stage, *overrides, f"parallel.activation_checkpointing={checkpointing}")
    for step in (0, 2) if "objective.vae_strategy.mode=interval" in overrides else (0,):
        assert step_flops(config, step)["executed"] == count_step(config, step).get_total_flops()


@pytest.mark.parametrize("stage", ["vae", "ar", "llada"])
def test_without_fused_kernels_no_scores_are_computed_again(stage: str) -> None:
    """Where there are no tiles, torch may be asked for its unfused kernel."""
    config = run_config(stage)
    with sdpa_kernel(SDPBackend.MATH):
        counted = count_step(config).get_total_flops()
    work = total(step_parts(config))
    assert work.recomputation > 0
    assert work.executed - work.recomputation == counted


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_teachers_forward_pass_is_counted(checkpointing: str, tmp_path: Path) -> None:
    teacher = run_config("joint", *CODEBOOK)
    networks = TextVAE(teacher.vae), BlockCausalDiT(teacher.dit)
    tokenizer = tiny_tokenizer(teacher.vae.vocab_size)
    ColaCheckpoint(*networks, tokenizer).save(tmp_path / "teacher")
    own = [f"teacher_from={tmp_path / 'teacher'}", "objective.vae_strategy.mode=fix"]
    own += [f"parallel.activation_checkpointing={checkpointing}"]
    settings = [*SMALL, *SMALL_DIT, "name=small", "data.path=nowhere", *own]
    config = load_config(DistillRunConfig, None, settings)
    assert step_flops(config, 0)["executed"] == count_step(config).get_total_flops()
    parts = step_parts(config)
    assert parts["teacher.head"].executed == parts["teacher.head"].executed_forward > 0


def test_each_part_is_what_its_modules_compute() -> None:
    """Forward, where torch's counter knows which module runs."""
    config = run_config("joint", "dit.num_layers=2", "vae.patch_size=2")
    parts, objective, batch = step_parts(config), build_objective(config), training_batch(config)
    # Without gradients: the vocabulary head's loss computes its own in the forward pass.
    with counter() as counted, torch.no_grad():
        objective(batch)

    def flops(network: str, *modules: str) -> int:
        by_module = {
            name.removeprefix("Stage2Objective."): ops
            for name, ops in counted.get_flop_counts().items()
        }
        return sum(
            sum(ops.values())
            for name, ops in by_module.items()
            if name.startswith(network) and name.endswith(modules)
        )

    block = ("qkv_proj", "attn_out_proj", "ffn_proj", "ffn_out")
    for part, modules in {
        "vae.encoder": ("vae.encoder",),
        "vae.encoder.linear": (*block, "patch_embedder", "final_layer"),
        "vae.decoder.linear": (*block, "in_layer", "unpatch_layer"),
        "vae.decoder.head": ("decoder.final_layer",),
        "reference_encoder": ("reference_encoder",),
        "reference_encoder.linear": (*block, "patch_embedder", "final_layer"),
        "dit": ("dit",),
        "dit.adaln": ("emb_in", "out_in", "msa_in", "msa_out", "mlp_in", "mlp_out"),
    }.items():
        network = part if len(modules) == 1 and "head" not in part else part.rpartition(".")[0]
        assert total(parts, part).executed_forward == flops(network, *modules), part
    # The last layer's queries are part of a projection: no module of their own. All that is neither
    # adaLN nor attention is left.
    products = sum(
        count
        for kernel, count in counted.get_flop_counts()["Stage2Objective.dit"].items()
        if "attention" not in str(kernel)
    )
    assert parts["dit.linear"].executed_forward == products - parts["dit.adaln"].executed_forward


def test_forward_and_backward_apart() -> None:
    config = run_config("ar")
    work = total(step_parts(config))
    objective, batch = build_objective(config), training_batch(config)
    counts = objective.counts(batch)
    with counter() as forward, torch.no_grad():
        objective(batch)
    with counter() as both:
        total_loss(objective(batch), counts).backward()
    assert forward.get_total_flops() == work.executed_forward
    assert (
        both.get_total_flops() - forward.get_total_flops()
        == work.executed_backward + work.recomputation
    )

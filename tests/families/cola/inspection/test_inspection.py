"""`cola-train inspect`: its parts agree with the objective, it writes numbers and a page, and
refuses what it cannot look at.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cola_train.cli import main
from cola_train.config.evaluation import InspectionConfig
from cola_train.config.settings import UserError
from cola_train.data.packing import VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.inspection.figure import draw_inspection
from cola_train.families.cola.inspection.inspection import (
    LatentInspection,
    half_time,
    inspect_latents,
)
from cola_train.families.cola.inspection.prior_probes import ReconstructionCurve
from cola_train.families.cola.losses import FlowConfig
from cola_train.flow import gaussian_baseline
from cola_train.models.config import TransformerConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.transformer import Transformer
from tests.helpers.held_out import held_out_flow, reconstruction_accuracy
from tests.helpers.initial import initialize_dit
from tests.helpers.tiny import calm, tiny_checkpoint, tiny_dit, tiny_vae

CHANNELS = 4
TRANSFORMER = TransformerConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    head_dim=8,
    num_hidden_layers=1,
)
QUICK = InspectionConfig(
    num_rows=7, batch_size=3, num_times=3, num_time_bins=4, num_steps=3, map_latents=60
)


@pytest.fixture(scope="module")
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


def of_data(data: PreparedData, dit: BlockCausalDiT | None, seed: int = 1) -> ColaCheckpoint:
    """A random checkpoint with the data's tokenizer."""
    checkpoint = tiny_checkpoint(calm(tiny_vae(seed, vocab_size=data.manifest.vocab_size)), dit)
    return dataclasses.replace(checkpoint, tokenizer=data.tokenizer)


def inspected(
    checkpoint: ColaCheckpoint,
    data: PreparedData,
    config: InspectionConfig,
    reference: ColaCheckpoint | None = None,
) -> LatentInspection:
    *batches, found = inspect_latents(checkpoint, data, config, reference)
    # One for each batch, for whoever waits.
    assert batches == [None] * -(-config.num_rows // config.batch_size)
    assert found is not None
    return found


def test_parts_of_an_inspection_agree_with_the_objective(data: PreparedData) -> None:
    checkpoint = of_data(data, tiny_dit())
    found = inspected(checkpoint, data, QUICK)
    accuracy = reconstruction_accuracy(checkpoint, data, QUICK.num_rows, QUICK.seed)
    assert found.posterior_accuracy.share == pytest.approx(accuracy, abs=1e-9)
    assert found.reconstruction.noised[0] == pytest.approx(accuracy, abs=1e-9)
    assert found.reconstruction.denoised is not None
    assert found.reconstruction.denoised[0] == pytest.approx(accuracy, abs=1e-9)
    flow = FlowConfig(time_distribution="uniform", timestep_per="block", prompt_block_prob=0.0)
    expected = held_out_flow(checkpoint, data, QUICK.num_rows, flow, QUICK.seed)
    assert found.flow is not None
    assert found.flow.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.flow.bound == pytest.approx(expected.bound, rel=1e-6)
    # Bins and blocks are parts of the same whole; all rows are full and so all blocks count alike.
    assert np.mean(found.flow.loss_by_block) == pytest.approx(expected.loss, rel=1e-6)
    assert np.mean(found.flow.baseline_by_block) == pytest.approx(expected.bound, rel=1e-6)


def test_an_untrained_dit_predicts_no_velocity_and_loses_to_the_bound(data: PreparedData) -> None:
    dit = tiny_dit()
    initialize_dit(dit, 0)
    checkpoint = of_data(data, dit)
    flow = inspected(checkpoint, data, dataclasses.replace(QUICK, num_rows=40)).flow
    assert flow is not None
    tokens = torch.stack([torch.from_numpy(data.row(VALIDATION, row)[0]) for row in range(40)])
    posterior = checkpoint.vae.encode(tokens)
    # Without a prediction the error is E[u^2] = 1 + E[mu^2] + E[sigma^2].
    expected = 1 + posterior.mean.square().mean() + posterior.logvar.exp().mean()
    assert flow.loss == pytest.approx(float(expected), rel=0.05)
    assert flow.bound < flow.loss
    variance = (
        posterior.mean.flatten(0, 1).var(0) + posterior.logvar.exp().flatten(0, 1).mean(0)
    ).detach()
    times = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    # 40 rows have 320 times: the two agree as far as so few draws can.
    assert flow.bound == pytest.approx(gaussian_baseline(variance, times), rel=0.1)


def test_the_batch_size_does_not_matter(data: PreparedData) -> None:
    checkpoint, reference = of_data(data, tiny_dit()), of_data(data, None, seed=4)
    one, other = (
        inspected(
            checkpoint, data, dataclasses.replace(QUICK, batch_size=size), reference
        ).to_json()
        for size in (3, 7)
    )
    assert flat(one) == pytest.approx(flat(other), rel=1e-4, abs=1e-5)


def flat(value: object, name: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {
            key: number
            for inner, part in value.items()
            for key, number in flat(part, f"{name}.{inner}").items()
        }
    if isinstance(value, (list, tuple)):
        return {
            key: number
            for place, part in enumerate(value)
            for key, number in flat(part, f"{name}.{place}").items()
        }
    return {name: value} if isinstance(value, (int, float)) else {}


def test_rows_of_one_block_have_no_history(data: PreparedData) -> None:
    found = inspected(of_data(data, tiny_dit(block_size=data.manifest.seq_len)), data, QUICK)
    assert found.history is None
    assert not any(name.startswith("history/") for name in found.metrics())


def test_the_time_of_half_reconstruction_lies_on_the_line_between_grid_points() -> None:
    assert half_time(ReconstructionCurve([0.0, 0.5, 1.0], [0.8, 0.6, 0.2], None)) == pytest.approx(
        0.75
    )
    assert half_time(ReconstructionCurve([0.0, 0.5, 1.0], [0.8, 0.8, 0.7], None)) == 1.0


def test_a_stage_1_checkpoint_has_what_needs_no_prior(data: PreparedData) -> None:
    found = inspected(of_data(data, None), data, QUICK)
    assert (found.flow, found.prior_accuracy, found.history, found.drift, found.block_size) == (
        None,
        None,
        None,
        None,
        None,
    )
    assert found.reconstruction.denoised is None
    assert len(found.posterior_accuracy.by_position) == data.manifest.seq_len
    whole = inspected(of_data(data, tiny_dit()), data, QUICK, of_data(data, None))
    assert whole.metrics().items() >= found.metrics().items()
    assert whole.metrics()["reference_kl_nats_per_token"] == 0
    tokens = np.concatenate([data.row(VALIDATION, row)[0] for row in range(QUICK.num_rows)])
    real = tokens[tokens != data.manifest.pad_token_id]
    assert found.majority_token_accuracy == pytest.approx(np.bincount(real).max() / len(real))
    # All pairs of tokens, each with itself too.
    assert found.chance_token_accuracy == pytest.approx((real[:, None] == real[None]).mean())


def write(checkpoint: ColaCheckpoint, folder: Path) -> Path:
    checkpoint.save(folder)
    return folder


def test_the_verb_writes_numbers_and_a_page_and_overwrites_nothing(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joint, vae = (
        write(of_data(data, tiny_dit()), tmp_path / "joint"),
        write(of_data(data, None, seed=4), tmp_path / "vae"),
    )
    arguments = [
        "inspect",
        str(joint),
        "--data",
        str(data.folder),
        "--reference",
        str(vae),
        "--device",
        "cpu",
    ]
    few, settings = (
        ["num_rows=4", "num_times=3", "num_steps=2"],
        InspectionConfig(num_rows=4, num_times=3, num_steps=2),
    )
    assert main([*arguments, *few]) == 0
    printed = capsys.readouterr().out
    folder = joint / "inspection"
    assert sorted(path.name for path in folder.iterdir()) == [
        "inspection.json",
        "inspection.png",
        "inspection.svg",
    ]
    written = json.loads((folder / "inspection.json").read_text(encoding="utf-8"))
    found = inspected(ColaCheckpoint.load(joint), data, settings, ColaCheckpoint.load(vae))
    assert written["figures"] == pytest.approx(found.metrics())
    assert written["settings"]["num_rows"] == 4
    for name, value in found.metrics().items():
        assert re.search(
            rf"{name.replace('/', ': ').replace('_', ' ')} +{re.escape(f'{value:.5g}')}\n", printed
        ), name
    # A random DiT is worse than any table.
    remarks = written["remarks"]
    assert [remark.split(":")[0] for remark in remarks] == [
        f"The prior knows less than a {order} table" for order in ("unigram", "bigram")
    ]
    assert all(f"\n{remark}\n" in printed for remark in remarks)
    assert found.nats is not None
    assert f"\n\n{found.nats.table()}\n" in printed
    elbo = written["nats"]["models"]["elbo"]
    assert elbo["meaning"].startswith("an upper bound of -log p")
    assert elbo["per_token"]["mean"] == pytest.approx(found.metrics()["elbo_nats_per_token"])
    assert (folder / "inspection.png").read_bytes().startswith(b"\x89PNG")
    svg = (folder / "inspection.svg").read_text(encoding="utf-8")
    panels = [
        "log_snr",
        "divergence",
        "drift",
        "reconstruction",
        "hits_by_position",
        "hits_by_block",
        "flow_by_time",
        "flow_by_block",
        "history",
        "map",
    ]
    for panel in panels:
        assert f'id="{panel}"' in svg
    # By time and by block.
    assert svg.count("codes and unigrams: ") == svg.count("codes and bigrams: ") == 2
    before = (folder / "inspection.json").read_bytes()
    assert main([*arguments, *few]) == 2
    assert (
        "inspection exists and is not overwritten; choose another --out, or remove it yourself."
        in capsys.readouterr().err
    )
    assert (folder / "inspection.json").read_bytes() == before
    assert (
        main(
            ["inspect", str(vae), "--data", str(data.folder), "--out", str(tmp_path / "out"), *few]
        )
        == 0
    )
    svg = (tmp_path / "out" / "inspection.svg").read_text(encoding="utf-8")
    assert [panel for panel in panels if f'id="{panel}"' in svg] == [
        "log_snr",
        "divergence",
        "reconstruction",
        "hits_by_position",
        "map",
    ]


def test_a_page_is_drawn_of_a_dead_vae_and_of_times_that_no_block_drew(
    data: PreparedData, tmp_path: Path
) -> None:
    checkpoint = of_data(data, tiny_dit(block_size=data.manifest.seq_len))
    # The final layer's first half is the mean, which is the same number in all channels: 0 after
    # the norm.
    final = checkpoint.vae.encoder.final_layer
    torch.nn.init.zeros_(final.weight[:CHANNELS])
    torch.nn.init.zeros_(final.bias[:CHANNELS])
    found = inspected(checkpoint, data, dataclasses.replace(QUICK, num_rows=2, num_time_bins=20))
    assert found.posterior.active_units == 0
    written = found.to_json()
    assert written["posterior"]["log_snr_per_channel"] == [None] * CHANNELS
    assert written["flow"]["loss_by_time"].count(None) == 18
    json.dumps(written, allow_nan=False)
    draw_inspection(found, "dead", tmp_path / "dead.png", tmp_path / "dead.svg")
    assert (tmp_path / "dead.png").read_bytes().startswith(b"\x89PNG")


def test_what_an_inspection_refuses(data: PreparedData, tmp_path: Path) -> None:
    good = of_data(data, tiny_dit())
    baseline = AutoregressiveCheckpoint(Transformer(TRANSFORMER, causal=True), data.tokenizer, {})
    with pytest.raises(
        UserError,
        match="A checkpoint of `cola-train ar` has no latents to inspect; give one that has",
    ):
        baseline.inspect(data, QUICK)
    with pytest.raises(
        UserError, match=r"was prepared with another tokenizer \(sha256 \w+\) than the checkpoint's"
    ):
        inspected(tiny_checkpoint(tiny_vae(), None), data, QUICK)
    with pytest.raises(
        UserError,
        match=r"data.seq_len \(32\) must be a multiple of patch_size x block_size \(1 x 5 = 5\)",
    ):
        inspected(of_data(data, tiny_dit(block_size=5)), data, QUICK)
    other = dataclasses.replace(good, vae=tiny_vae(vocab_size=320, latent_dim=2), dit=None)
    with pytest.raises(
        UserError,
        match=(
            r"The reference must have the checkpoint's tokenizer.*\(320, 4, 1\), not \(320, 2, 1\)"
        ),
    ):
        inspected(good, data, QUICK, other)
    folder = write(good, tmp_path / "good")
    few_rows = PreparedData(
        data.folder,
        dataclasses.replace(data.manifest, splits={"train": data.manifest.splits["train"]}),
    )
    with pytest.raises(
        UserError,
        match=(
            r"needs at least 2 held-out rows; .* has 0. Prepare data with a larger held_out_share"
        ),
    ):
        inspected(ColaCheckpoint.load(folder), few_rows, QUICK)


def test_with_several_tokens_a_latent_the_gaussian_bound_stands_alone(data: PreparedData) -> None:
    vae = calm(tiny_vae(vocab_size=data.manifest.vocab_size, patch_size=2))
    found = inspected(dataclasses.replace(of_data(data, tiny_dit()), vae=vae), data, QUICK)
    assert found.flow is not None
    assert found.nats is not None
    assert found.flow.yardsticks is None
    assert "flow_gaussian_baseline" in found.metrics()
    assert not any(name.startswith(("flow_un", "flow_bi")) for name in found.metrics())
    # What needs no codes.
    assert {"elbo", "unigram", "bigram", "uniform"} == found.nats.models.keys()
    (remark,) = found.remarks()
    assert remark.startswith("No n-gram yardsticks: a latent holds several tokens")


def test_a_baseline_is_no_reference(
    data: PreparedData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(of_data(data, None), tmp_path / "good")
    transformer = Transformer(TRANSFORMER, causal=True)
    AutoregressiveCheckpoint(transformer, data.tokenizer, {}).save(tmp_path / "ar")
    arguments = ["--data", str(data.folder), "--reference", str(tmp_path / "ar")]
    assert main(["inspect", str(good), *arguments]) == 2
    assert (
        "The reference has no encoder; give the stage-1 checkpoint that this one started from."
        in capsys.readouterr().err
    )
    assert not (good / "inspection").exists()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("num_rows", 1, "InspectionConfig.num_rows must be at least 2, not 1"),
        ("batch_size", 1, "InspectionConfig.batch_size must be at least 2, not 1"),
        ("num_times", 1, "InspectionConfig.num_times must be at least 2, not 1"),
        ("num_time_bins", 0, "InspectionConfig.num_time_bins must be at least 1, not 0"),
        ("elbo_draws", 0, "InspectionConfig.elbo_draws must be in 1..4096, not 0"),
        ("yardstick_rows", 0, "InspectionConfig.yardstick_rows must be at least 1 or null, not 0"),
        ("num_steps", 0, "InspectionConfig.num_steps must be at least 1, not 0"),
        ("map_latents", 2, "InspectionConfig.map_latents must be at least 3, not 2"),
        ("seed", -1, r"InspectionConfig.seed must be in \[0, 2\^63\), not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        InspectionConfig(**{name: value})


def test_figures_have_names_that_stay(data: PreparedData) -> None:
    found = inspected(of_data(data, tiny_dit()), data, QUICK, of_data(data, None, seed=4))
    assert list(found.metrics()) == [
        "vae_log_snr",
        "active_units",
        "active_units_share",
        "kl_nats_per_token",
        "information_nats_per_latent",
        "posterior_token_accuracy",
        "majority_token_accuracy",
        "chance_token_accuracy",
        "noise_time_of_half_reconstruction",
        "prior_token_accuracy",
        "prior_token_accuracy_first_block",
        "flow_mse",
        "flow_gaussian_baseline",
        "flow_over_gaussian_baseline",
        "flow_unigram",
        "flow_minus_unigram",
        "flow_minus_unigram_standard_error",
        "flow_bigram",
        "flow_minus_bigram",
        "flow_minus_bigram_standard_error",
        "elbo_nats_per_token",
        "elbo_nats_per_byte",
        "elbo_nats_per_token_standard_error",
        "elbo_reconstruction_nats_per_token",
        "elbo_unigram_nats_per_token",
        "elbo_unigram_nats_per_byte",
        "elbo_bigram_nats_per_token",
        "elbo_bigram_nats_per_byte",
        "unigram_nats_per_token",
        "unigram_nats_per_byte",
        "bigram_nats_per_token",
        "bigram_nats_per_byte",
        "uniform_nats_per_token",
        "uniform_nats_per_byte",
        "history/true_history",
        "history/shuffled_history",
        "history/no_history",
        "history/gain_over_shuffled",
        "history/gain_over_shuffled_standard_error",
        "history/gain_over_none",
        "history/gain_over_none_standard_error",
        "reference_kl_nats_per_token",
        "reference_rms_change_of_means",
        "reference_cosine_of_means",
    ]

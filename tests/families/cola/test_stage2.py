"""Stage 2's loss: terms by hand, draws by frequency, and by autograd what may learn from what."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola.losses import FlowConfig, Stage2Config, VAEStrategyConfig
from cola_train.families.cola.stage1 import standard_normal_latents
from cola_train.families.cola.stage2 import FlowDraws, Stage2Objective, flow_draws, position_times
from cola_train.flow import velocity_target
from cola_train.models.modulation import Times
from cola_train.models.text_vae import Posterior, TextVAE
from cola_train.randomness import Purpose
from tests.helpers.compare import assert_near, largest_difference, number
from tests.helpers.losses import losses_of
from tests.helpers.partition import added_up, assert_same_step
from tests.helpers.statistics import assert_distribution, assert_shares, assert_uncorrelated
from tests.helpers.tiny import randomize, rows_of, tiny_dit, tiny_vae

SEED = 13
BLOCK_SIZE = 4
# Half of the blocks are prompt blocks, so that every few rows have some.
FLOW = FlowConfig(prompt_block_prob=0.5)
CONFIG = Stage2Config(
    vae_weight=0.5,
    entropy_weight=0.03,
    mask_weight=0.7,
    mask_ratio=0.25,
    flow_weight=1.3,
    reference_weight=0.2,
    flow=FLOW,
    vae_strategy=VAEStrategyConfig(mode="interval", joint_steps=1, frozen_steps=1),
)
JOINT, FROZEN = 0, 1  # steps


def moved(vae: TextVAE) -> TextVAE:
    """`vae` after some training: other weights than the reference encoder's."""
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.1)
    return vae


def make_objective(
    patch_size: int = 1, seed: int = SEED, flow: dict[str, Any] | None = None, **changes: Any
) -> Stage2Objective:
    config = dataclasses.replace(CONFIG, flow=dataclasses.replace(FLOW, **flow or {}), **changes)
    objective = Stage2Objective(
        tiny_vae(patch_size=patch_size), tiny_dit(block_size=BLOCK_SIZE), config, seed
    )
    moved(objective.vae)
    return objective


def draws_of(objective: Stage2Objective, batch: Batch) -> FlowDraws:
    num_blocks = batch.tokens.shape[1] // (objective.vae.config.patch_size * BLOCK_SIZE)
    return flow_draws(
        objective.config.flow, batch.sample_index, num_blocks, BLOCK_SIZE, objective.seed
    )


def real_latents(batch: Batch, patch_size: int) -> Tensor:
    return torch.stack([batch.loss_mask[:, k::patch_size] for k in range(patch_size)]).any(0)


def flow_by_hand(objective: Stage2Objective, batch: Batch) -> float:
    """Row by row from the definition: z_t on the path, pinned positions clean, the mean over what
    counts.
    """
    config, patch_size = objective.config, objective.vae.config.patch_size
    documents = batch.document_ids[:, ::patch_size] if config.mask_documents else None
    posterior = objective.vae.encode(batch.tokens, documents)
    if config.fixed_log_snr is not None:
        posterior = posterior.with_log_snr(config.fixed_log_snr)
    rows, latents, channels = posterior.mean.shape
    z_0 = posterior.sample(
        standard_normal_latents(objective.seed, Purpose.POSTERIOR_EPS, batch, latents, channels)
    )
    z_1 = standard_normal_latents(objective.seed, Purpose.FLOW_NOISE, batch, latents, channels)
    draws, real = draws_of(objective, batch), real_latents(batch, patch_size)
    num_real, total, count = real.sum(), 0.0, 0
    if config.flow.learn_padding:
        for block in real.split(BLOCK_SIZE, dim=1):
            block[block.any(1)] = True
        assert num_real < real.sum() < real.numel()
    for row in range(rows):
        t = draws.t[row].repeat_interleave(BLOCK_SIZE)
        t = torch.where(draws.pinned[row], 0.0, t)
        z_t = (1 - t)[:, None] * z_0[row] + t[:, None] * z_1[row]
        velocity = objective.dit.velocity(
            z_t[None],
            z_0[row][None],
            Times(torch.cat([t, torch.zeros(1)]), torch.arange(latents)[None]),
            None if documents is None else documents[row][None],
            None if draws.sees_history is None else draws.sees_history[row][None],
        )[0]
        error = (velocity - velocity_target(z_0[row], z_1[row])).square()
        for place in range(latents):
            if real[row, place] and not draws.pinned[row, place]:
                total += number(error[place].double().mean())
                count += 1
    assert 0 < count < int(real.sum())
    return total / count


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("timestep_per", ["sample", "block"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mask_documents": True},
        {"fixed_log_snr": 1.5},
        {"flow": {"history_dropout": 0.5}},
        {"flow": {"time_distribution": "uniform"}},
        {"flow": {"learn_padding": True}},
        {"mask_documents": True, "flow": {"learn_padding": True}},
    ],
    ids=str,
)
def test_flow_term_by_hand(
    six_rows: Batch, patch_size: int, timestep_per: str, changes: dict[str, Any]
) -> None:
    flow = {**changes.get("flow", {}), "timestep_per": timestep_per}
    objective = make_objective(patch_size, **{**changes, "flow": flow})
    by_hand = flow_by_hand(objective, six_rows)
    assert_near(losses_of(objective, six_rows).terms["flow_mse"], torch.tensor(by_hand))
    frozen = losses_of(objective, six_rows, step=FROZEN)
    assert_near(frozen.terms["flow_mse"], torch.tensor(by_hand))
    assert set(frozen.terms) == set(frozen.weights) == {"flow_mse"}
    assert frozen.metrics == {}


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("log_snr", [None, 1.0])
def test_entropy_and_reference_terms_by_hand(
    six_rows: Batch, patch_size: int, log_snr: float | None
) -> None:
    objective = make_objective(patch_size, fixed_log_snr=log_snr)
    losses = losses_of(objective, six_rows)

    def encode(vae: TextVAE) -> Posterior:
        posterior = vae.encode(six_rows.tokens)
        return posterior if log_snr is None else posterior.with_log_snr(log_snr)

    now, before = encode(objective.vae), encode(tiny_vae(patch_size=patch_size))
    real, tokens = real_latents(six_rows, patch_size), int(six_rows.loss_mask.sum())
    entropy = torch.distributions.Normal(now.mean, now.logvar.exp().sqrt()).entropy().sum(-1)
    assert_near(losses.terms["negative_entropy_nats_per_token"], -(entropy * real).sum() / tokens)
    ours, theirs = (
        torch.distributions.Normal(q.mean.double(), q.logvar.double().exp().sqrt())
        for q in (now, before)
    )
    divergence = (torch.distributions.kl_divergence(ours, theirs).sum(-1) * real).sum() / tokens
    assert divergence > 1e-3
    torch.testing.assert_close(
        losses.terms["reference_kl_nats_per_token"].double(), divergence, rtol=1e-4, atol=1e-5
    )


def test_kl_to_a_shifted_reference(six_rows: Batch) -> None:
    """Where the reference differs by its log-variance's bias alone, by delta: KL = (exp(-delta) - 1
    + delta) / 2 a channel.
    """
    vae = tiny_vae()
    objective = Stage2Objective(vae, tiny_dit(), CONFIG, SEED)
    assert number(losses_of(objective, six_rows).terms["reference_kl_nats_per_token"]) == 0.0
    with torch.no_grad():
        vae.encoder.final_layer.bias[4:] -= 0.5
    expected = 4 * (math.exp(-0.5) - 1 + 0.5) / 2
    assert_near(
        losses_of(objective, six_rows).terms["reference_kl_nats_per_token"], torch.tensor(expected)
    )


def test_weights_and_total(six_rows: Batch) -> None:
    losses = losses_of(make_objective(), six_rows)
    assert losses.weights == {
        "flow_mse": 1.3,
        "reconstruction_nats_per_token": 0.5,
        "negative_entropy_nats_per_token": 0.5 * 0.03,
        "mask_nats_per_masked_token": 0.5 * 0.7,
        "reference_kl_nats_per_token": 0.2,
    }
    assert set(losses.terms) == set(losses.weights)
    terms = {name: number(value) for name, value in losses.terms.items()}
    vae_part = (
        terms["reconstruction_nats_per_token"] + 0.03 * terms["negative_entropy_nats_per_token"]
    )
    vae_part += 0.7 * terms["mask_nats_per_masked_token"]
    total = 0.5 * vae_part + 1.3 * terms["flow_mse"] + 0.2 * terms["reference_kl_nats_per_token"]
    assert number(losses.total) == pytest.approx(total, rel=1e-5)


def test_defaults_are_the_methods(six_rows: Batch) -> None:
    objective = Stage2Objective(tiny_vae(), tiny_dit(), Stage2Config(), SEED)
    assert losses_of(objective, six_rows).weights == {
        "flow_mse": 1.0,
        "reconstruction_nats_per_token": 1.0,
        "negative_entropy_nats_per_token": 1e-4,
        "mask_nats_per_masked_token": 1.0,
        "reference_kl_nats_per_token": 1e-2,
    }
    flow = Stage2Config().flow
    assert (
        flow.prompt_block_prob,
        flow.history_dropout,
        flow.grad_to_encoder,
        flow.timestep_per,
        flow.learn_padding,
    ) == (0.05, 0.0, True, "sample", False)
    assert (flow.time_distribution, flow.time_loc, flow.time_scale) == ("logit_normal", 1.0, 1.0)


def test_without_a_reference_there_is_no_reference_term(six_rows: Batch) -> None:
    for objective in (
        make_objective(reference_weight=0.0),
        make_objective(vae_strategy=VAEStrategyConfig(mode="fix")),
    ):
        assert objective.reference_encoder is None
        losses = losses_of(objective, six_rows)
        assert "reference_kl_nats_per_token" not in losses.weights.keys() | losses.terms.keys()


@pytest.mark.parametrize(
    ("patch_size", "changes"),
    [
        (1, {}),
        (2, {}),
        (1, {"mask_documents": True, "flow": {"timestep_per": "block", "history_dropout": 0.5}}),
        (2, {"fixed_log_snr": 1.0, "flow": {"grad_to_encoder": False}}),
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [JOINT, FROZEN])
def test_micro_batches_add_up_to_the_step(
    six_rows: Batch, patch_size: int, changes: dict[str, Any], step: int
) -> None:
    objective = make_objective(patch_size, **changes)
    pinned = draws_of(objective, six_rows).pinned.any(1)
    assert pinned.any()
    whole = added_up(objective, six_rows, 6, step)
    for rows_each in (1, 2, 3):
        assert_same_step(added_up(objective, six_rows, rows_each, step), whole)
    trained = {name.split(".")[0] for name, gradient in whole[1].items() if gradient.any()}
    assert trained == ({"vae", "dit"} if step == JOINT else {"dit"})


# Gradient control


def gradients_of(objective: Stage2Objective, value: Tensor) -> dict[str, Tensor]:
    """The gradients of `value`, by parameter, of those that get any."""
    objective.zero_grad()
    value.backward()
    return {
        name: p.grad.clone()
        for name, p in objective.named_parameters()
        if p.grad is not None and p.grad.any()
    }


@pytest.mark.parametrize("grad_to_encoder", [True, False])
def test_the_flow_term_reaches_the_encoder_only_where_asked(
    six_rows: Batch, grad_to_encoder: bool
) -> None:
    objective = make_objective(flow={"grad_to_encoder": grad_to_encoder})
    flow = gradients_of(objective, losses_of(objective, six_rows).terms["flow_mse"])
    reached = {
        name.split(".")[0] + "." + name.split(".")[1]
        for name in flow
        if name.startswith(("vae", "reference"))
    }
    assert reached == ({"vae.encoder"} if grad_to_encoder else set())
    assert {name for name, _ in objective.named_parameters() if name.startswith("dit.")} == {
        n for n in flow if n.startswith("dit.")
    }


def test_only_the_noised_path_carries_the_flow_gradient(six_rows: Batch) -> None:
    """Against a flow loss in which target, history and pinned positions are constants by
    construction.
    """
    objective = make_objective()
    ours = gradients_of(objective, losses_of(objective, six_rows).terms["flow_mse"])

    posterior = objective.vae.encode(six_rows.tokens)
    z_0 = posterior.sample(standard_normal_latents(SEED, Purpose.POSTERIOR_EPS, six_rows, 24, 4))
    z_1 = standard_normal_latents(SEED, Purpose.FLOW_NOISE, six_rows, 24, 4)
    constant = z_0.detach().clone()
    draws = draws_of(objective, six_rows)
    times = position_times(draws, BLOCK_SIZE, FlowConfig(timestep_per="sample"))
    t = times.distinct[times.index][..., None]
    counted = (six_rows.loss_mask & ~draws.pinned)[..., None]

    def gradients(
        path: Tensor, pinned: Tensor, history: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        z_t = torch.where(draws.pinned[..., None], pinned, (1 - t) * path + t * z_1)
        error = (objective.dit.velocity(z_t, history, times) - (z_1 - target)).square()
        objective.zero_grad()
        ((error * counted).sum() / counted.sum() / 4).backward(retain_graph=True)
        return {
            name: p.grad.clone()
            for name, p in objective.named_parameters()
            if p.grad is not None and p.grad.any()
        }

    expected = gradients(z_0, constant, constant, constant)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    # Each of the three, let through, would have shown.
    name = "vae.encoder.final_layer.weight"
    for leak in (
        gradients(z_0, z_0, constant, constant),
        gradients(z_0, constant, z_0, constant),
        gradients(z_0, constant, constant, z_0),
    ):
        assert largest_difference(leak[name], expected[name]) > 1e-4


def test_the_reference_encoder_never_learns(six_rows: Batch) -> None:
    objective = make_objective()
    assert objective.reference_encoder is not None
    before = {
        name: value.clone() for name, value in objective.reference_encoder.state_dict().items()
    }
    assert not any(
        parameter.requires_grad for parameter in objective.reference_encoder.parameters()
    )
    losses_of(objective, six_rows).total.backward()
    assert all(parameter.grad is None for parameter in objective.reference_encoder.parameters())
    # A copy, not the VAE's own tensors: moving the VAE leaves it where it was.
    moved(objective.vae)
    assert all(
        torch.equal(value, before[name])
        for name, value in objective.reference_encoder.state_dict().items()
    )
    at_start = tiny_vae().encoder.state_dict()
    assert all(torch.equal(value, at_start[name]) for name, value in before.items())


@pytest.mark.parametrize("mode", ["fix", "interval"])
def test_frozen_steps_give_the_vae_no_gradient(six_rows: Batch, mode: str) -> None:
    strategy = VAEStrategyConfig(mode=mode, joint_steps=1, frozen_steps=1)  # type: ignore[arg-type]
    objective = make_objective(vae_strategy=strategy)
    losses_of(objective, six_rows, step=FROZEN).total.backward()
    assert all(parameter.grad is None for parameter in objective.vae.parameters())
    assert all(parameter.grad is not None for parameter in objective.dit.parameters())
    assert all(
        parameter.requires_grad == (mode != "fix") for parameter in objective.vae.parameters()
    )


def test_each_term_reaches_what_it_should(six_rows: Batch) -> None:
    objective = make_objective()
    reached = {}
    for name in losses_of(objective, six_rows).weights:
        terms = losses_of(objective, six_rows).terms
        reached[name] = {
            ".".join(parameter.split(".")[:2])
            for parameter in gradients_of(objective, terms[name])
            if "vae" in parameter
        }
        assert any(p.grad is not None for p in objective.dit.parameters()) == (name == "flow_mse")
    both, encoder = {"vae.encoder", "vae.decoder"}, {"vae.encoder"}
    assert reached == {
        "flow_mse": encoder,
        "reconstruction_nats_per_token": both,
        "mask_nats_per_masked_token": both,
        "negative_entropy_nats_per_token": encoder,
        "reference_kl_nats_per_token": encoder,
    }


# Draws


def many_draws(
    rows: int = 4000, num_blocks: int = 4, block_size: int = 8, **changes: Any
) -> FlowDraws:
    return flow_draws(
        dataclasses.replace(FlowConfig(), **changes),
        torch.arange(rows),
        num_blocks,
        block_size,
        SEED,
    )


@pytest.mark.parametrize(("loc", "scale"), [(1.0, 1.0), (-0.5, 2.0)])
def test_times_are_logit_normal(loc: float, scale: float) -> None:
    t = many_draws(time_loc=loc, time_scale=scale).t[:, 0].double()
    assert_distribution(t, torch.special.ndtr((torch.logit(t) - loc) / scale))


def test_times_are_uniform_in_the_ablation() -> None:
    t = many_draws(time_distribution="uniform").t[:, 0]
    assert_distribution(t, t)


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform"])
def test_a_time_for_a_sample_or_for_each_block(distribution: str) -> None:
    per_sample = many_draws(time_distribution=distribution).t
    assert torch.equal(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert per_sample[:, 0].unique().numel() > 3990
    per_block = many_draws(time_distribution=distribution, timestep_per="block").t
    assert torch.equal(per_block[:, 0], per_sample[:, 0])
    for block in range(1, 4):
        assert_uncorrelated(per_block[:, 0], per_block[:, block])


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_prompt_blocks_pin_their_first_positions(block_size: int) -> None:
    pinned = (
        many_draws(block_size=block_size, prompt_block_prob=0.3)
        .pinned.unflatten(1, (-1, block_size))
        .flatten(0, 1)
    )
    lengths = pinned.sum(1)
    # The first ones, and never the whole block.
    assert torch.equal(pinned, torch.arange(block_size) < lengths[:, None])
    assert lengths.max() == block_size - 1
    if block_size > 1:
        shares = torch.tensor([0.7, *[0.3 / (block_size - 1)] * (block_size - 1)])
        assert_shares(lengths.bincount(minlength=block_size), shares)
    assert not many_draws(block_size=block_size, prompt_block_prob=0.0).pinned.any()


def test_which_blocks_are_prompts_is_independent() -> None:
    pinned = many_draws(prompt_block_prob=0.3).pinned.unflatten(1, (-1, 8)).any(-1).float()
    for block in range(1, 4):
        assert_uncorrelated(pinned[:, 0], pinned[:, block])
    assert_uncorrelated(pinned[:, 0], many_draws().t[:, 0])


def test_history_is_hidden_from_whole_blocks_as_often_as_asked() -> None:
    assert many_draws().sees_history is None
    seen = many_draws(history_dropout=0.2).sees_history
    assert seen is not None
    per_block = seen.unflatten(1, (-1, 8))
    assert torch.equal(per_block, per_block[..., :1].expand_as(per_block))
    hidden = int((~per_block[..., 0]).sum())
    assert_shares(torch.tensor([hidden, 16_000 - hidden]), torch.tensor([0.2, 0.8]))


def test_draws_are_the_samples_own() -> None:
    config = FlowConfig(prompt_block_prob=0.5, history_dropout=0.5, timestep_per="block")
    together = flow_draws(config, torch.arange(6), 3, 4, SEED)
    assert together.sees_history is not None
    for row in range(6):
        alone = flow_draws(config, torch.tensor([row]), 3, 4, SEED)
        assert alone.sees_history is not None
        assert torch.equal(alone.t[0], together.t[row])
        assert torch.equal(alone.pinned[0], together.pinned[row])
        assert torch.equal(alone.sees_history[0], together.sees_history[row])
    other = flow_draws(config, torch.arange(6), 3, 4, SEED + 1)
    assert not torch.equal(other.t, together.t)


@pytest.mark.parametrize("timestep_per", ["sample", "block"])
def test_position_times_index_the_draws(timestep_per: str) -> None:
    draws = many_draws(rows=5, prompt_block_prob=0.5, timestep_per=timestep_per)
    times = position_times(draws, 8, FlowConfig(timestep_per=timestep_per))
    expected = torch.where(draws.pinned, 0.0, draws.t.repeat_interleave(8, dim=1))
    assert draws.pinned.any()
    assert torch.equal(times.distinct[times.index], expected)
    assert float(times.distinct[-1]) == 0.0
    assert times.distinct.numel() == (5 if timestep_per == "sample" else 20) + 1


# Interval


def test_interval_trains_first_and_then_rests() -> None:
    interval = VAEStrategyConfig(mode="interval", joint_steps=2, frozen_steps=3)
    assert [interval.trains_vae(step) for step in range(11)] == [
        True,
        True,
        False,
        False,
        False,
    ] * 2 + [True]
    paper = VAEStrategyConfig(mode="interval")
    assert [paper.trains_vae(step) for step in (0, 1999, 2000, 4999, 5000, 6999, 7000)] == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    for mode, trains in (("joint", True), ("fix", False)):
        assert {VAEStrategyConfig(mode=mode).trains_vae(step) for step in range(6000)} == {trains}  # type: ignore[arg-type]


def test_the_dit_learns_the_same_in_a_frozen_step(six_rows: Batch) -> None:
    """Freezing stops the VAE's gradient and nothing else."""
    objective = make_objective()
    randomize(objective.vae, 99)
    joint = gradients_of(
        objective, losses_of(objective, rows_of(six_rows, slice(0, 2))).terms["flow_mse"]
    )
    frozen = gradients_of(
        objective, losses_of(objective, rows_of(six_rows, slice(0, 2)), step=FROZEN).total / 1.3
    )
    assert frozen
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, joint[name], rtol=1e-4, atol=1e-6)

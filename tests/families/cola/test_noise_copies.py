"""Several noised copies of a row over one clean copy, against runs of one copy each."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_train.config.settings import UserError
from cola_train.data.batch import Batch
from cola_train.families.cola.losses import FlowConfig, Stage2Config
from cola_train.families.cola.stage1 import standard_normal_latents
from cola_train.families.cola.stage2 import FlowDraws, Stage2Objective, flow_draws, position_times
from cola_train.flow import interpolate
from cola_train.randomness import Purpose
from tests.helpers.compare import assert_near, number
from tests.helpers.losses import losses_of
from tests.helpers.tiny import tiny_dit, tiny_vae

SEED, COPIES = 7, 3
FLOW = FlowConfig(noise_copies=COPIES, prompt_block_prob=0.5, history_dropout=0.3)


def draws(flow: FlowConfig, copies: int) -> FlowDraws:
    return flow_draws(dataclasses.replace(flow, noise_copies=copies), torch.arange(6), 6, 4, SEED)


def part_of(drawn: FlowDraws, copy: int) -> FlowDraws:
    """One copy's, as if it were alone."""
    assert drawn.sees_history is not None
    t, pinned, shown = (
        x.unflatten(1, (COPIES, -1))[:, copy] for x in (drawn.t, drawn.pinned, drawn.sees_history)
    )
    return FlowDraws(t, pinned, shown)


@pytest.mark.parametrize("timestep_per", ["sample", "block"])
def test_the_first_copy_draws_what_a_single_one_does_and_each_its_own(timestep_per: Any) -> None:
    flow = dataclasses.replace(FLOW, timestep_per=timestep_per)
    alone, together = draws(flow, 1), draws(flow, COPIES)
    first, second = part_of(together, 0), part_of(together, 1)
    assert torch.equal(first.t, alone.t)
    assert torch.equal(first.pinned, alone.pinned)
    assert not torch.equal(second.t, alone.t)
    assert not torch.equal(second.pinned, alone.pinned)
    times = position_times(together, 4, flow)
    for copy in range(COPIES):
        drawn = part_of(together, copy)
        expected = torch.where(drawn.pinned, 0.0, drawn.t.repeat_interleave(4, dim=1))
        assert torch.equal(
            times.distinct[times.index].unflatten(1, (COPIES, -1))[:, copy], expected
        )
    assert len(times.distinct) == 6 * COPIES * (1 if timestep_per == "sample" else 6) + 1


@pytest.mark.parametrize("timestep_per", ["sample", "block"])
def test_the_loss_is_the_mean_over_what_counts_in_all_copies(
    six_rows: Batch, timestep_per: Any
) -> None:
    """Each copy by a pass of its own."""
    flow = dataclasses.replace(FLOW, timestep_per=timestep_per)
    objective = Stage2Objective(tiny_vae(), tiny_dit(), Stage2Config(flow=flow), SEED)
    counts = objective.counts(six_rows)
    found = losses_of(objective, six_rows).terms["flow_mse"]

    posterior = objective.vae.encode(six_rows.tokens)
    _, latents, channels = posterior.mean.shape
    z_0 = posterior.sample(
        standard_normal_latents(SEED, Purpose.POSTERIOR_EPS, six_rows, latents, channels)
    ).detach()
    noise = standard_normal_latents(
        SEED, Purpose.FLOW_NOISE, six_rows, latents, channels, COPIES
    ).unflatten(1, (COPIES, -1))
    single = standard_normal_latents(SEED, Purpose.FLOW_NOISE, six_rows, latents, channels)
    assert torch.equal(noise[:, 0], single)
    assert not torch.equal(noise[:, 1], single)
    drawn = flow_draws(flow, six_rows.sample_index, latents // 4, 4, SEED)
    total, count = 0.0, 0
    for copy in range(COPIES):
        own = part_of(drawn, copy)
        times = position_times(own, 4, dataclasses.replace(flow, noise_copies=1))
        z_1: Tensor = noise[:, copy]
        z_t = interpolate(z_0, z_1, times.distinct[times.index][..., None])
        velocity = objective.dit.velocity(z_t, z_0, times, None, own.sees_history)
        counted = six_rows.loss_mask & ~own.pinned
        total += number(((velocity - (z_1 - z_0)).square().mean(-1) * counted).sum())
        count += int(counted.sum())
    assert int(counts["flow_latents"]) == count
    assert_near(found, torch.tensor(total / count), 1e-5)


def test_no_copies_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="noise_copies must be at least 1, not 0"):
        FlowConfig(noise_copies=0)

"""Stage 1's loss: its terms and weights by hand, and the same whatever the micro-batches."""

import dataclasses

import pytest
import torch

from cola_train.data.batch import Batch
from cola_train.families.cola.losses import Stage1Config
from cola_train.families.cola.stage1 import Stage1Objective
from tests.helpers.compare import assert_near, number
from tests.helpers.losses import losses_of
from tests.helpers.partition import added_up, assert_same_step
from tests.helpers.tiny import tiny_vae

SEED = 12
CONFIG = Stage1Config(kl_weight=0.03, mask_weight=0.7, mask_ratio=0.25)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_kl_and_total_by_hand(six_rows: Batch, patch_size: int) -> None:
    vae = tiny_vae(patch_size=patch_size)
    losses = losses_of(Stage1Objective(vae, CONFIG, SEED), six_rows)
    posterior = vae.encode(six_rows.tokens)
    kl = 0.0
    for row in range(6):
        for latent in range(24 // patch_size):
            if six_rows.loss_mask[row, latent * patch_size : (latent + 1) * patch_size].any():
                mu, logvar = (
                    posterior.mean[row, latent].double(),
                    posterior.logvar[row, latent].double(),
                )
                kl += number((mu**2 + logvar.exp() - 1 - logvar).sum() / 2)
    assert_near(
        losses.terms["kl_nats_per_token"], torch.tensor(kl / int(six_rows.loss_mask.sum())), 1e-4
    )

    terms = {name: number(value) for name, value in losses.terms.items()}
    total = (
        terms["reconstruction_nats_per_token"]
        + 0.03 * terms["kl_nats_per_token"]
        + 0.7 * terms["mask_nats_per_masked_token"]
    )
    assert len(terms) == 3
    assert number(losses.total) == pytest.approx(total, rel=1e-6)


def test_the_paper_is_silent_and_the_defaults_are_the_methods(six_rows: Batch) -> None:
    assert losses_of(Stage1Objective(tiny_vae(), Stage1Config(), SEED), six_rows).weights == {
        "reconstruction_nats_per_token": 1.0,
        "kl_nats_per_token": 1e-4,
        "mask_nats_per_masked_token": 1.0,
    }
    assert Stage1Config().mask_ratio == 0.15


def test_no_mask_weight_no_mask_term(six_rows: Batch) -> None:
    objective = Stage1Objective(tiny_vae(), dataclasses.replace(CONFIG, mask_weight=0.0), SEED)
    losses = losses_of(objective, six_rows)
    assert (
        set(losses.terms)
        == set(losses.weights)
        == {"reconstruction_nats_per_token", "kl_nats_per_token"}
    )


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_micro_batches_add_up_to_the_step(
    six_rows: Batch, patch_size: int, mask_documents: bool
) -> None:
    config = dataclasses.replace(CONFIG, mask_documents=mask_documents)
    objective = Stage1Objective(tiny_vae(patch_size=patch_size), config, SEED)
    whole = added_up(objective, six_rows, 6)
    assert len(whole[1]) == len(list(objective.parameters()))
    for rows_each in (1, 2, 3):
        assert_same_step(added_up(objective, six_rows, rows_each), whole)
    # A mean of the parts' own means is another number: the parts have unlike counts.
    own_means = [
        number(losses_of(objective, Batch(*(x[row : row + 1] for x in six_rows))).total)
        for row in range(6)
    ]
    assert sum(own_means) / 6 != pytest.approx(
        number(losses_of(objective, six_rows).total), rel=1e-3
    )


def test_padding_alone_gives_zero_losses_and_no_gradient(six_rows: Batch) -> None:
    objective = Stage1Objective(tiny_vae(), CONFIG, SEED)
    padding = Batch(*(x[2:3] for x in six_rows))
    assert not padding.loss_mask.any()
    losses = losses_of(objective, padding)
    losses.total.backward()
    assert all(float(value) == 0 for value in losses.values().values())
    assert not any(
        parameter.grad.any() for parameter in objective.parameters() if parameter.grad is not None
    )


def test_seeds_and_samples_draw_differently(six_rows: Batch) -> None:
    vae = tiny_vae()
    totals = {
        number(losses_of(Stage1Objective(vae, CONFIG, seed), batch).total)
        for seed in (1, 2)
        for batch in (six_rows, six_rows._replace(sample_index=six_rows.sample_index + 6))
    }
    assert len(totals) == 4

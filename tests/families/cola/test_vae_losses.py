"""The loss terms both stages share, against hand computation from their definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.cola.losses import Stage1Config
from cola_train.families.cola.stage1 import (
    VAEPass,
    latent_mask,
    mask_positions,
    standard_normal_latents,
    vae_counts,
    vae_log_snr,
    vae_pass,
)
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import documents_of
from cola_train.randomness import Purpose, normal, uniform
from tests.helpers.compare import assert_near, largest_difference, number
from tests.helpers.tiny import make_batch, random_tokens, tiny_vae

SEED = 11
RATIO = 0.25


def run_pass(
    vae: TextVAE,
    batch: Batch,
    mask_weight: float = 1.0,
    log_snr: float | None = None,
    mask_documents: bool = False,
) -> VAEPass:
    config = Stage1Config(
        mask_ratio=RATIO,
        mask_weight=mask_weight,
        fixed_log_snr=log_snr,
        mask_documents=mask_documents,
    )
    return vae_pass(vae, batch, config, SEED)


def means_of(out: VAEPass, batch: Batch, patch_size: int = 1) -> dict[str, Tensor]:
    """Terms and metrics of a pass over `batch`, by their names in metrics.jsonl."""
    counts = vae_counts(batch, patch_size, Stage1Config(mask_ratio=RATIO), SEED)
    return {term.key: term.share(counts) for term in (out.reconstruction, *out.mask, *out.metrics)}


def masked_by_hand(batch: Batch) -> list[list[int]]:
    """Of each row's n real tokens the round(ratio x n) with the smallest draws, at least one."""
    seq = batch.tokens.shape[1]
    draws = uniform(SEED, Purpose.TOKEN_MASK, batch.sample_index, seq).tolist()
    out = []
    for row, real in zip(draws, batch.loss_mask.tolist(), strict=True):
        places = sorted((place for place in range(seq) if real[place]), key=row.__getitem__)
        out.append(sorted(places[: max(1, round(RATIO * len(places)))]))
    return out


def nats(logits: Tensor, token: int) -> float:
    return -number(logits.double().log_softmax(-1)[token])


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("mask_documents", [False, True])
def test_terms_and_metrics_by_hand(six_rows: Batch, patch_size: int, mask_documents: bool) -> None:
    vae, batch = tiny_vae(patch_size=patch_size, block_size=2), six_rows
    out = run_pass(vae, batch, mask_documents=mask_documents)
    means = means_of(out, batch, patch_size)
    rows, seq = batch.tokens.shape
    latents = seq // patch_size
    documents = batch.document_ids[:, ::patch_size] if mask_documents else None

    def draw(purpose: Purpose) -> Tensor:
        return normal(SEED, purpose, batch.sample_index, latents * 4).reshape(rows, latents, 4)

    posterior = vae.encode(batch.tokens, documents)
    z_0 = posterior.sample(draw(Purpose.POSTERIOR_EPS))
    logits = vae.decode(z_0, documents)
    assert_near(out.z_0, z_0)
    assert_near(out.posterior.mean, posterior.mean)
    assert_near(out.posterior.logvar, posterior.logvar)

    real = [
        (row, place) for row in range(rows) for place in range(seq) if batch.loss_mask[row, place]
    ]
    cross_entropy = [nats(logits[row, place], int(batch.tokens[row, place])) for row, place in real]
    assert_near(
        means["reconstruction_nats_per_token"], torch.tensor(sum(cross_entropy) / len(real))
    )
    hits = sum(
        int(logits[row, place].argmax()) == int(batch.tokens[row, place]) for row, place in real
    )
    assert_near(means["reconstruction_accuracy"], torch.tensor(hits / len(real)))

    masked = masked_by_hand(batch)
    copy = batch.tokens.clone()
    for row, places in enumerate(masked):
        copy[row, places] = vae.mask_token_id
    masked_logits = vae.decode(
        vae.encode(copy, documents).sample(draw(Purpose.MASKED_POSTERIOR_EPS)), documents
    )
    losses = [
        nats(masked_logits[row, place], int(batch.tokens[row, place]))
        for row, places in enumerate(masked)
        for place in places
    ]
    assert 0 < len(losses) < len(real)
    assert_near(means["mask_nats_per_masked_token"], torch.tensor(sum(losses) / len(losses)))

    real_latents = {(row, place // patch_size) for row, place in real}
    squares = [number(posterior.mean[at].square().mean()) for at in real_latents]
    variances = [number(posterior.logvar[at].exp().mean()) for at in real_latents]
    assert_near(means["posterior_mean_square"], torch.tensor(sum(squares) / len(squares)))
    torch.testing.assert_close(
        means["posterior_variance"], torch.tensor(sum(variances) / len(variances))
    )


def test_masking_uses_real_tokens_alone_and_exactly_as_many_as_asked(six_rows: Batch) -> None:
    seq = six_rows.tokens.shape[1]
    positions = mask_positions(six_rows, RATIO, SEED)
    assert positions.shape == (6, round(RATIO * seq))
    by_hand = masked_by_hand(six_rows)
    for row, places in enumerate(positions.tolist()):
        assert len(set(places)) == len(places)
        assert sorted(place for place in places if six_rows.loss_mask[row, place]) == by_hand[row]
    counts = vae_counts(six_rows, 1, Stage1Config(mask_ratio=RATIO), SEED)
    assert int(counts["masked_tokens"]) == sum(map(len, by_hand)) < 6 * round(RATIO * seq)
    real = int(six_rows.loss_mask.sum())
    assert int(counts["masked_tokens"]) == pytest.approx(RATIO * real, abs=0.5 * 6)
    assert int(counts["tokens"]) == int(six_rows.loss_mask.sum())


@settings(max_examples=50)
@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**40))
def test_a_full_row_masks_the_share_exactly(seq: int, ratio: float, index: int) -> None:
    batch = make_batch(random_tokens(1, seq, seed=91), [0], first_index=index)
    positions = mask_positions(batch, ratio, SEED)[0].tolist()
    assert len(set(positions)) == max(1, round(ratio * seq))
    assert all(0 <= position < seq for position in positions)


@settings(max_examples=50)
@given(st.integers(1, 40), st.floats(0, 1), st.data())
def test_the_share_is_of_the_real_tokens(seq: int, ratio: float, data: st.DataObject) -> None:
    """Not of the row: at 0.25 a row of 32 with 20 real tokens had 8 of them masked."""
    real = data.draw(st.integers(0, seq))
    batch = make_batch(random_tokens(1, seq, seed=93), [seq - real])
    positions = mask_positions(batch, ratio, SEED)
    assert len(set(positions[0].tolist())) == positions.shape[1] == max(1, round(ratio * seq))
    masked = int(batch.loss_mask.gather(1, positions).sum())
    assert masked == min(real, max(1, round(ratio * real)))


@pytest.mark.parametrize(("real", "masked"), [(20, 5), (4, 1), (32, 8), (0, 0)])
def test_a_quarter_of_a_rows_tokens(real: int, masked: int) -> None:
    batch = make_batch(random_tokens(1, 32, seed=94), [32 - real])
    counts = vae_counts(batch, 1, Stage1Config(mask_ratio=0.25), SEED)
    assert int(counts["masked_tokens"]) == masked


def test_every_position_is_masked_as_often() -> None:
    batch = make_batch(random_tokens(4000, 8, seed=92), [0] * 4000)
    hits = torch.zeros(8).index_add(
        0, mask_positions(batch, RATIO, SEED).flatten(), torch.ones(8000)
    )
    # 2 of 8 per row, so each place is hit with probability 1/4; 5 standard deviations.
    assert (hits - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


def test_masked_tokens_are_not_read_by_the_masked_copy(six_rows: Batch) -> None:
    """Changing the token under a mask changes what is asked for, not what the encoder of the masked
    copy reads.
    """
    vae = tiny_vae()
    at = mask_positions(six_rows, RATIO, SEED)
    # Padding stays as it is.
    real = six_rows.loss_mask.gather(1, at)
    changed = torch.where(real, 7, six_rows.tokens.gather(1, at))
    seen: list[Tensor] = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run_pass(vae, six_rows)
    run_pass(vae, six_rows._replace(tokens=six_rows.tokens.scatter(1, at, changed)))
    (clean, masked), (other_clean, other_masked) = (tokens.chunk(2) for tokens in seen)
    assert torch.equal(masked, other_masked)
    assert not torch.equal(clean, other_clean)
    assert torch.equal(clean, six_rows.tokens)
    assert torch.equal((masked != clean).sum(1), real.sum(1))
    assert (masked[masked != clean] == vae.mask_token_id).all()


def test_no_mask_weight_no_masked_copy(six_rows: Batch) -> None:
    vae = tiny_vae()
    rows: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[0]))
    passes = [run_pass(vae, six_rows, mask_weight) for mask_weight in (1.0, 0.0)]
    assert rows == [12, 6]
    with_mask, without = (means_of(out, six_rows) for out in passes)
    assert set(with_mask) - set(without) == {"mask_nats_per_masked_token"}
    assert "masked_tokens" not in vae_counts(six_rows, 1, Stage1Config(mask_weight=0.0), SEED)
    assert_near(
        with_mask["reconstruction_nats_per_token"], without["reconstruction_nats_per_token"]
    )


def test_a_fixed_log_snr_replaces_the_variance_everywhere(six_rows: Batch) -> None:
    vae = tiny_vae()
    out = run_pass(vae, six_rows, log_snr=1.5)
    eps = standard_normal_latents(SEED, Purpose.POSTERIOR_EPS, six_rows, 24, 4)
    assert_near(out.z_0, vae.encode(six_rows.tokens).mean + math.exp(-0.75) * eps)
    means = means_of(out, six_rows)
    assert vae_log_snr({name: number(value) for name, value in means.items()})[
        "vae_log_snr"
    ] == pytest.approx(1.5, abs=1e-3)
    assert largest_difference(out.z_0, run_pass(vae, six_rows).z_0) > 1e-2
    # The decoder's gradient reaches the encoder through the mean alone.
    means["reconstruction_nats_per_token"].backward()
    gradient = vae.encoder.final_layer.weight.grad
    assert gradient is not None
    assert gradient[:4].any()
    assert not gradient[4:].any()


@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_latents_count_if_any_token_does(patch_size: int) -> None:
    mask = torch.tensor([[True] * 7 + [False] * 5, [True] * 12, [False] * 12])
    counted = latent_mask(mask, patch_size)
    for row in range(3):
        for latent in range(12 // patch_size):
            assert bool(counted[row, latent]) == any(
                mask[row, latent * patch_size : (latent + 1) * patch_size].tolist()
            )


def test_documents_of_latents(six_rows: Batch) -> None:
    assert documents_of(six_rows, 2, mask_documents=False) is None
    documents = documents_of(six_rows, 2, mask_documents=True)
    assert documents is not None
    for row in range(6):
        pairs = six_rows.document_ids[row].tolist()
        assert documents[row].tolist() == [pairs[place] for place in range(0, 24, 2)]
        assert pairs[::2] == pairs[1::2]  # a latent never holds two documents here


def test_the_vae_log_snr_follows_from_its_moments() -> None:
    moments = {"posterior_mean_square": 2.0, "posterior_variance": 0.5}
    assert vae_log_snr({"flow_mse": 3.0, **moments}) == {"vae_log_snr": pytest.approx(math.log(4))}
    for square, variance in ((0.0, 1.0), (1.0, 0.0)):
        broken = vae_log_snr({"posterior_mean_square": square, "posterior_variance": variance})
        assert math.isnan(broken["vae_log_snr"])
    # Where the VAE took no part there is none.
    assert vae_log_snr({"flow_mse": 3.0}) == {}

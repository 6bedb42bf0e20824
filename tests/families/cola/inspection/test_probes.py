"""The evaluators of an inspection: each figure against a slow loop, a closed form, or what another
part of the project finds.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from cola_train.config.evaluation import InspectionConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.blocks import BlockGeneration
from cola_train.families.cola.inspection.latent_rows import (
    LatentRows,
    decode_after_history,
    latent_rows,
    likeliest_tokens,
    transport_all_blocks,
)
from cola_train.families.cola.inspection.posterior_probes import (
    DriftTally,
    MapTally,
    PosteriorTally,
    token_kinds,
)
from cola_train.families.cola.inspection.prior_probes import (
    FlowTally,
    prior_tokens,
)
from cola_train.families.cola.inspection.tallies import Tally, paired_gain
from cola_train.families.cola.losses import FlowConfig
from cola_train.families.cola.stage1 import latent_mask, standard_normal_latents
from cola_train.families.cola.stage2 import flow_draws, position_times
from cola_train.flow import interpolate, velocity_target
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import Posterior, TextVAE
from cola_train.randomness import Purpose
from tests.helpers.tiny import (
    PAD,
    calm,
    make_batch,
    random_latents,
    random_tokens,
    tiny_dit,
    tiny_tokenizer,
    tiny_vae,
)

SEQ, CHANNELS = 16, 4
QUICK = InspectionConfig(
    num_rows=7, batch_size=3, num_times=3, num_time_bins=4, num_steps=3, map_latents=60
)


@pytest.fixture(scope="module")
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


def some_rows(
    vae: TextVAE, rows: int = 3, padding: list[int] | None = None, documents: Tensor | None = None
) -> LatentRows:
    batch = make_batch(random_tokens(rows, SEQ, seed=5), padding or [0, 3, 1][:rows])
    posterior = vae.encode(batch.tokens, documents)
    z_0, z_1 = (random_latents(*posterior.mean.shape, seed=seed) for seed in (6, 7))
    return LatentRows(
        batch, posterior, z_0, z_1, latent_mask(batch.loss_mask, vae.config.patch_size), documents
    )


def by_hand(mean: Tensor, logvar: Tensor, counted: Tensor | None = None) -> LatentRows:
    """Rows whose posterior is given; their tokens play no part."""
    batch = make_batch(random_tokens(*mean.shape[:2], seed=5), [0] * mean.shape[0])
    counted = torch.ones(mean.shape[:2], dtype=torch.bool) if counted is None else counted
    return LatentRows(
        batch._replace(loss_mask=counted), Posterior(mean, logvar), mean, mean, counted, None
    )


@given(
    st.lists(
        st.tuples(st.floats(-5, 5), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30
    ),
    st.integers(1, 7),
)
def test_a_tally_gives_each_group_its_mean_whatever_the_batches(
    items: list[tuple[float, bool, int]], size: int
) -> None:
    tally = Tally(4)
    for start in range(0, len(items), size):
        values, weights, groups = zip(*items[start : start + size])
        tally.add(
            torch.tensor(values, dtype=torch.float64), torch.tensor(weights), torch.tensor(groups)
        )
    for group, mean in enumerate(tally.means()):
        of_group = [value for value, weight, at in items if weight and at == group]
        assert mean == pytest.approx(
            sum(of_group) / len(of_group) if of_group else float("nan"), nan_ok=True
        )
    chosen = [value for value, weight, _ in items if weight]
    assert tally.mean() == pytest.approx(
        sum(chosen) / len(chosen) if chosen else float("nan"), nan_ok=True
    )


def test_a_channel_that_ignores_the_text_is_no_active_unit_and_tells_nothing() -> None:
    mean = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0))
    mean[..., 1] = 0.7  # large, but the same for every text
    logvar = torch.tensor([-1.0, -2.0, 0.0]).expand_as(mean)
    counted = torch.ones(2, 500, dtype=torch.bool)
    counted[1, 400:] = False
    mean[1, 400:] = 1e6  # padding
    whole, parts = PosteriorTally(3), PosteriorTally(3)
    whole.add(by_hand(mean, logvar, counted))
    for row in range(2):
        parts.add(by_hand(mean[row : row + 1], logvar[row : row + 1], counted[row : row + 1]))
    health = whole.result()
    for name, value in dataclasses.asdict(health).items():
        assert getattr(parts.result(), name) == pytest.approx(value)
    real, variance = mean[counted].double(), logvar[0, 0].double().exp()
    assert (health.active_units, health.active_units_share) == (2, pytest.approx(2 / 3))
    assert health.mean_variance_per_channel == pytest.approx(
        real.var(0, correction=0).tolist(), abs=1e-12
    )
    assert health.log_snr == pytest.approx(float((real.square().mean() / variance.mean()).log()))
    kl = kl_divergence(Normal(real, variance.sqrt()), Normal(0.0, 1.0)).mean(0)
    assert health.kl_per_channel == pytest.approx(kl.tolist())
    assert health.kl_nats_per_token == pytest.approx(float(kl.sum()))
    # A Gaussian channel's capacity at this signal and noise; 0 without a signal.
    capacity = 0.5 * (1 + real.var(0, correction=0) / variance).log()
    assert health.information_per_channel == pytest.approx(capacity.tolist(), abs=1e-12)
    assert health.information_per_channel[1] == pytest.approx(0, abs=1e-12)
    aggregate = Normal(real.mean(0), (real.var(0, correction=0) + variance).sqrt())
    best = kl_divergence(Normal(real, variance.sqrt()), aggregate)
    assert health.information_per_channel == pytest.approx(best.mean(0).tolist(), abs=1e-12)


def test_drift_is_none_from_itself_and_else_that_of_two_normals() -> None:
    vae, other = tiny_vae(), tiny_vae(8)
    rows = some_rows(vae)
    same, drift = DriftTally(vae.encoder), DriftTally(other.encoder)
    with torch.no_grad():
        same.add(rows)
        drift.add(rows)
        p, q = (network.encode(rows.batch.tokens) for network in (vae, other))
    assert dataclasses.astuple(same.result()) == (0.0, 0.0, pytest.approx(1.0), [0.0] * CHANNELS)
    normals = (
        Normal(x.mean[rows.counted].double(), (0.5 * x.logvar[rows.counted].double()).exp())
        for x in (p, q)
    )
    kl = kl_divergence(*normals)
    found = drift.result()
    assert found.kl_per_channel == pytest.approx(kl.mean(0).tolist())
    assert found.kl_nats_per_token == pytest.approx(float(kl.sum(-1).mean()))
    change = (p.mean - q.mean)[rows.counted]
    assert found.rms_change_of_means == pytest.approx(
        float(change.square().mean().sqrt()), rel=1e-5
    )
    cosine = torch.cosine_similarity(p.mean, q.mean, dim=-1)[rows.counted].mean()
    assert found.cosine_of_means == pytest.approx(float(cosine), abs=1e-5)


@pytest.mark.parametrize("patch_size, vae_block", [(1, 1), (2, 1), (1, 2)])
def test_prior_hits_are_what_the_sampler_writes_after_each_true_beginning(
    patch_size: int, vae_block: int
) -> None:
    vae, dit = (
        calm(network)
        for network in (
            tiny_vae(patch_size=patch_size, block_size=vae_block),
            tiny_dit(block_size=2),
        )
    )
    rows, num_steps, seed = some_rows(vae, padding=[0, 0, 0]), 3, 9
    config = SamplerConfig(
        num_steps=num_steps,
        guidance_scale=1.0,
        max_new_tokens=2 * patch_size,
        repetition_penalty=1.0,
    )
    shape = rows.posterior.mean.shape
    noise = standard_normal_latents(seed, Purpose.SAMPLER_NOISE, rows.batch, *shape[1:]).unflatten(
        1, (-1, 2)
    )
    found = prior_tokens(vae, dit, rows, num_steps, seed)
    means = rows.posterior.mean
    latents = transport_all_blocks(dit, means, noise.flatten(1, 2), None, num_steps)
    checked = 0
    with torch.inference_mode():
        for block in range(shape[1] // 2):
            prompts = rows.batch.tokens[:, : block * 2 * patch_size].tolist()
            sampler = BlockGeneration(
                vae,
                dit,
                prompts,
                [0, 1, 2],
                config,
                PAD,
                lambda row, _, block=block: noise[row, block],
            )
            generated = sampler.next_block()
            at = slice(2 * block, 2 * block + 2)
            assert torch.allclose(latents[:, at], generated.latents, atol=2e-5), block
            tokens = slice(at.start * patch_size, at.stop * patch_size)
            assert torch.equal(found[:, tokens], generated.tokens)
            checked += generated.tokens.numel()
    assert checked == rows.batch.tokens.numel()
    # The two are not alike by being constant.
    assert len(found.unique()) > 3


def test_documents_are_apart_in_every_pass() -> None:
    vae, dit = calm(tiny_vae()), calm(tiny_dit())
    documents = torch.tensor([0] * 4 + [1] * 8 + [2] * 4).expand(2, SEQ)
    rows = some_rows(vae, rows=2, padding=[0, 0], documents=documents)
    found = prior_tokens(vae, dit, rows, 2, seed=0)
    noise = standard_normal_latents(0, Purpose.SAMPLER_NOISE, rows.batch, SEQ, CHANNELS)
    for start, end in ((0, 4), (4, 12), (12, 16)):
        alone = vae.encode(rows.batch.tokens[:, start:end]).mean
        blocks = transport_all_blocks(dit, alone, noise[:, start:end], None, 2)
        assert torch.equal(found[:, start:end], decode_after_history(vae, alone, blocks, None, 4))


def test_the_decoder_given_its_own_history_decodes_as_in_one_pass() -> None:
    vae = tiny_vae()
    z = random_latents(3, SEQ, CHANNELS, seed=3)
    assert torch.equal(decode_after_history(vae, z, z, None, 4), vae.decode(z).argmax(-1))
    assert torch.equal(likeliest_tokens(vae, vae.decoder(z)), vae.decode(z).argmax(-1))


def tallied(
    dit: BlockCausalDiT, vae: TextVAE, data: PreparedData
) -> tuple[FlowTally, list[LatentRows]]:
    tally = FlowTally(dit, data.manifest.seq_len, num_time_bins=5, seed=3)
    with torch.no_grad():
        rows = list(latent_rows(vae, data, QUICK))
        for some in rows:
            tally.add(some)
    return tally, rows


def test_losses_by_time_block_and_history_are_those_of_a_loop_over_rows_and_blocks(
    data: PreparedData,
) -> None:
    vae, dit = tiny_vae(vocab_size=data.manifest.vocab_size), tiny_dit()
    tally, batches = tallied(dit, vae, data)
    z_0, z_1, counted, index = (
        torch.cat(parts)
        for parts in zip(
            *((rows.z_0, rows.z_1, rows.counted, rows.batch.sample_index) for rows in batches)
        )
    )
    flow = FlowConfig(time_distribution="uniform", timestep_per="block", prompt_block_prob=0.0)
    draws = flow_draws(flow, index, 8, 4, 3)
    times = position_times(draws, 4, flow)
    t = draws.t.repeat_interleave(4, dim=1)[..., None]
    donors = torch.cat([z_0[1:2], z_0[:-1]])
    losses = {}
    with torch.no_grad():
        for name, history in (("true", z_0), ("shuffled", donors), ("none", None)):
            if history is None:
                # Each block by itself is a row that has no history.
                alone = [part.unflatten(1, (8, 4)).flatten(0, 1) for part in (z_0, z_1, t)]
                own = dataclasses.replace(
                    times, index=times.index.unflatten(1, (8, 4)).flatten(0, 1)
                )
                v = (
                    dit.velocity(interpolate(*alone), alone[0], own)
                    .unflatten(0, (-1, 8))
                    .flatten(1, 2)
                )
            else:
                v = dit.velocity(interpolate(z_0, z_1, t), history, times)
            losses[name] = (v - velocity_target(z_0, z_1)).square().mean(-1)
    found = tally.result()
    for block in range(8):
        at = slice(4 * block, 4 * block + 4)
        assert found.loss_by_block[block] == pytest.approx(
            float(losses["true"][:, at][counted[:, at]].mean()), rel=1e-5
        )
    for number in range(5):
        inside = counted & (t[..., 0] >= number / 5) & (t[..., 0] < (number + 1) / 5)
        assert found.loss_by_time[number] == pytest.approx(
            float(losses["true"][inside].mean()), rel=1e-5
        )
    use = tally.history_use()
    assert use is not None
    after_first = counted.clone()
    after_first[:, :4] = False
    found = {"true": use.true_history, "shuffled": use.shuffled_history, "none": use.no_history}
    assert found == pytest.approx(
        {name: float(loss[after_first].mean()) for name, loss in losses.items()}, rel=1e-5
    )
    assert use.gain_over_shuffled == pytest.approx(
        use.shuffled_history - use.true_history, abs=1e-6
    )
    assert abs(use.gain_over_shuffled) > 1e-3


def test_a_prior_that_ignores_history_gains_nothing_from_it(data: PreparedData) -> None:
    dit = tiny_dit(block_size=1)
    for block in dit.blocks:
        # A block of one latent attends to history and itself; without attention only the latent
        # itself is left.
        torch.nn.init.zeros_(block.get_parameter("msa.proj_out.weight"))
    use = tallied(dit, tiny_vae(vocab_size=data.manifest.vocab_size), data)[0].history_use()
    assert use is not None
    assert use.true_history > 0.1
    for value in dataclasses.astuple(use)[3:]:
        assert value == pytest.approx(0, abs=1e-7)


def test_the_standard_error_of_a_gain_is_that_of_a_mean_where_rows_are_alike() -> None:
    gains = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gain, error = paired_gain(5 * gains, torch.full((40,), 5.0, dtype=torch.float64))
    assert (gain, error) == (
        pytest.approx(float(gains.mean())),
        pytest.approx(float(gains.std()) / 40**0.5),
    )
    # Rows of several lengths: against the bootstrap of the ratio.
    count = torch.randint(1, 30, (40,), generator=torch.Generator().manual_seed(3)).double()
    total = count * (1 + gains)
    chosen = np.random.default_rng(0).integers(0, 40, (4000, 40))
    ratios = total.numpy()[chosen].sum(1) / count.numpy()[chosen].sum(1)
    assert paired_gain(total, count)[1] == pytest.approx(ratios.std(), rel=0.15)


def test_a_map_of_points_in_a_plane_keeps_their_distances() -> None:
    generator = torch.Generator().manual_seed(4)
    plane = torch.linalg.qr(torch.randn(5, 2, generator=generator))[0]
    points = torch.randn(2, 30, 2, generator=generator) * torch.tensor([3.0, 1.0])
    mean = points @ plane.T + 2.0
    counted = torch.ones(2, 30, dtype=torch.bool)
    counted[0, 10:] = False
    tally = MapTally(25, tiny_tokenizer(), 1)
    tally.add(by_hand(mean, torch.zeros_like(mean), counted))
    found = tally.result()
    kept = torch.cat([points[0, :10], points[1, :15]])
    assert torch.allclose(
        torch.pdist(torch.tensor([found.x, found.y]).T), torch.pdist(kept), atol=1e-3
    )
    centred = (kept - kept.mean(0)).double()
    spread = np.linalg.eigvalsh((centred.T @ centred).numpy())
    assert found.variance_shares == pytest.approx(tuple((spread / spread.sum())[::-1]), rel=1e-4)
    assert sum(found.variance_shares) == pytest.approx(1)


@given(
    st.lists(st.sampled_from(["The", "cat", "sat", "on", "42", "mats"]), min_size=1, max_size=12),
    st.sampled_from([" ", ", ", ".\n\n"]),
)
def test_a_word_starts_once(data: PreparedData, words: list[str], between: str) -> None:
    tokenizer = data.tokenizer
    kinds = token_kinds(tokenizer.encode(between.join(words)), tokenizer)
    assert kinds.count("word start") == len(words)
    assert ("punctuation" in kinds) == (between != " " and len(words) > 1)
    assert token_kinds([tokenizer.eos_token_id], tokenizer) == ["special"]

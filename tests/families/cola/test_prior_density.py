"""The prior's density: against scipy on a Gaussian flow, whose velocity is known; and of a DiT,
which must integrate to 1.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import multivariate_normal
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.families.cola.likelihood import (
    block_log_densities,
    log_density,
    velocity_and_divergence,
)
from cola_train.models.attention.cached import CachedAttention
from cola_train.models.attention.masks import clean_layout, visible_set_mask
from cola_train.models.attention.rows import LayerAttention
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.modulation import Times
from tests.helpers.gaussian import GaussianFlow, gaussian_flow
from tests.helpers.tiny import calm, random_latents, tiny_dit

FLOW = gaussian_flow(3, seed=1)
EXACT = LikelihoodConfig(divergence="exact")


def points(*shape: int, seed: int = 5) -> Tensor:
    return 1.5 * torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def signs(*shape: int, seed: int) -> Tensor:
    return (
        2.0 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).double() - 1
    )


def true_density(flow: GaussianFlow, z: Tensor) -> Tensor:
    return torch.from_numpy(
        multivariate_normal(flow.mean.numpy(), flow.covariance.numpy()).logpdf(z.numpy())
    )


def quiet_dit(**changes: int) -> BlockCausalDiT:
    return calm(tiny_dit(**changes)).eval().requires_grad_(False)


def smooth_dit() -> BlockCausalDiT:
    """Deaf to the waves of its time embedding that turn by more than 5 radians over t in [0, 1].

    A network of random weights feels them all, which a trained one has learned to smooth out: which
    steps dopri5 takes at its default tolerance, and so its error of some 0.1 nats, then hangs on a
    CPU's rounding.
    """
    dit = quiet_dit()
    weight = dit.emb_in.proj_in.weight
    num_waves = weight.shape[1] // 2
    fast = 1000 * 10_000 ** (-torch.arange(num_waves) / num_waves) > 5
    with torch.no_grad():
        weight[:, torch.cat([fast, fast])] = 0
    return dit


# On a Gaussian flow


@pytest.mark.parametrize(
    ("settings", "largest", "mean"),
    [
        ({"solver": "euler", "num_steps": 128}, 1.5, 0.3),
        ({"solver": "trapezoid", "num_steps": 16}, 0.2, 0.05),
        ({"solver": "trapezoid", "num_steps": 128}, 3e-3, 5e-4),
        ({"solver": "dopri5", "rtol": 1e-3, "atol": 1e-3}, 0.2, 0.03),
        ({"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}, 3e-5, 1e-5),
    ],
)
def test_a_gaussian_density_is_scipys(
    settings: dict[str, float], largest: float, mean: float
) -> None:
    # 200 points up to four standard deviations out; nats.
    z = points(50, 4, 3)
    config = dataclasses.replace(EXACT, **settings)  # type: ignore[arg-type]
    error = (log_density(FLOW.velocity, z, config) - true_density(FLOW, z)).abs()
    assert float(error.max()) < largest
    assert float(error.mean()) < mean


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("trapezoid", 2)])
def test_its_error_falls_with_the_solvers_order(solver: str, order: int) -> None:
    z = points(20, 2, 3)
    errors = []
    for num_steps in (64, 128, 256):
        config = dataclasses.replace(EXACT, solver=solver, num_steps=num_steps)  # type: ignore[arg-type]
        errors.append(
            float((log_density(FLOW.velocity, z, config) - true_density(FLOW, z)).abs().mean())
        )
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)


def test_hutchinsons_estimate_is_off_by_what_the_probe_says() -> None:
    # Here the Jacobian is the same everywhere and its integral over t is -log(S) / 2: the error of
    # a probe e is known.
    integral = torch.from_numpy(-0.5 * scipy.linalg.logm(FLOW.covariance.numpy()))
    z, probe = points(40, 2, 3), points(40, 2, 3, seed=9)
    config = dataclasses.replace(EXACT, num_steps=256)
    off = log_density(FLOW.velocity, z, config, probe) - log_density(FLOW.velocity, z, config)
    expected = torch.einsum("rbi,ij,rbj->rb", probe, integral, probe) - integral.trace()
    assert torch.allclose(off, expected, atol=2e-3)
    assert float(off.abs().max()) > 1


def test_hutchinsons_estimate_is_unbiased() -> None:
    count = 4000
    z = points(1, 1, 3).expand(count, 1, 3)
    exact = log_density(FLOW.velocity, z[:1], EXACT)
    found = log_density(FLOW.velocity, z, EXACT, signs(count, 1, 3, seed=2))
    assert float(found.std()) > 0.3
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / count**0.5


def test_with_signs_it_is_exact_for_a_diagonal_jacobian_and_with_normals_it_is_not() -> None:
    flow = GaussianFlow(FLOW.mean, torch.diag(torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)))
    z = points(30, 2, 3)
    exact = log_density(flow.velocity, z, EXACT)
    assert torch.allclose(
        log_density(flow.velocity, z, EXACT, signs(30, 2, 3, seed=3)), exact, atol=1e-12
    )
    assert (
        float((log_density(flow.velocity, z, EXACT, points(30, 2, 3, seed=3)) - exact).std()) > 0.5
    )


# On a DiT


def divergence_by_differences(dit: BlockCausalDiT, z: Tensor, history: Tensor, t: float) -> Tensor:
    """Of the only row, block by block, from velocities a little to both sides of each
    coordinate.
    """
    times = Times(torch.tensor([t, 0.0]), torch.zeros(1, z.shape[1], dtype=torch.long))
    step, total = 1e-2, torch.zeros(z.shape[1])
    for latent, channel in itertools.product(range(z.shape[1]), range(z.shape[2])):
        shift = torch.zeros_like(z)
        shift[0, latent, channel] = step
        above, below = (dit.velocity(z + sign * shift, history, times) for sign in (1, -1))
        total[latent] += (above - below)[0, latent, channel] / (2 * step)
    return total.unflatten(0, (-1, dit.config.block_size)).sum(1)


def test_the_divergence_is_that_of_finite_differences() -> None:
    dit = quiet_dit()
    z, history = random_latents(1, 8, 4, seed=1), random_latents(1, 8, 4, seed=2)
    times = Times(torch.tensor([0.3, 0.0]), torch.zeros(1, 8, dtype=torch.long))

    def velocity(blocks: Tensor, t: Tensor) -> Tensor:
        return (
            dit.velocity(blocks.float().unflatten(2, (4, 4)).flatten(1, 2), history, times)
            .unflatten(1, (2, 4))
            .flatten(2)
            .double()
        )

    v, divergence = velocity_and_divergence(
        velocity, z.unflatten(1, (2, 4)).flatten(2).double(), torch.tensor(0.3).double(), None
    )
    assert torch.allclose(v[0].float(), dit.velocity(z, history, times).reshape(2, 16), atol=1e-6)
    assert torch.allclose(
        divergence[0].float(), divergence_by_differences(dit, z, history, 0.3), atol=2e-3
    )
    assert float(divergence.abs().min()) > 0.02


def test_hutchinson_agrees_with_the_exact_divergence_on_a_dit() -> None:
    dit, count = quiet_dit(), 600
    z_0 = random_latents(1, 8, 4, seed=3).expand(count, 8, 4)
    exact = block_log_densities(dit, z_0[:1], dataclasses.replace(EXACT, num_steps=4))[0]
    found = block_log_densities(
        dit, z_0, dataclasses.replace(EXACT, num_steps=4), probe=signs(count, 8, 4, seed=4).float()
    )
    deviation = found.std(0)
    assert float(deviation.min()) > 0.1
    assert float(((found.mean(0) - exact).abs() / deviation).max()) * count**0.5 < 4


def test_solvers_agree_on_a_dit() -> None:
    # 16 coordinates a block; nats.
    dit, z_0, probe = smooth_dit(), random_latents(3, 8, 4, seed=6), signs(3, 8, 4, seed=6).float()

    def density(**settings: float | str) -> Tensor:
        return block_log_densities(dit, z_0, LikelihoodConfig(**settings), probe=probe)  # type: ignore[arg-type]

    fine = density(solver="dopri5", rtol=1e-4, atol=1e-4)
    assert float((density(solver="dopri5") - fine).abs().max()) < 0.03
    assert float((density(solver="trapezoid", num_steps=128) - fine).abs().max()) < 0.003
    assert float((density(solver="trapezoid") - fine).abs().max()) < 0.003


def test_a_row_cut_after_a_block_gives_that_block_the_same_density() -> None:
    dit, z_0 = quiet_dit(), random_latents(2, 12, 4, seed=7)
    config = dataclasses.replace(EXACT, num_steps=4)
    whole = block_log_densities(dit, z_0, config)
    assert whole.shape == (2, 3)
    for blocks in (1, 2):
        cut = block_log_densities(dit, z_0[:, : 4 * blocks], config)
        assert torch.allclose(cut, whole[:, :blocks], atol=1e-5)
    # History matters: the last block after another first one.
    other = torch.cat([random_latents(2, 4, 4, seed=8), z_0[:, 4:]], dim=1)
    assert float((block_log_densities(dit, other, config)[:, 1:] - whole[:, 1:]).abs().min()) > 1e-2


def test_block_at_a_time_through_the_samplers_cache_gives_the_same() -> None:
    dit, z_0 = quiet_dit(), random_latents(2, 12, 4, seed=7)
    config = dataclasses.replace(EXACT, num_steps=4)
    places = clean_layout(4, 4)
    inside = visible_set_mask(places, places)[0]
    cache = dit.new_cache(2, 12)
    index = torch.zeros(2, 4, dtype=torch.long)
    found = []
    for block in z_0.split(4, dim=1):

        def velocity(z: Tensor, t: Tensor) -> Tensor:
            attention = CachedAttention(cache, inside)
            latents = z.float().reshape(2, 4, 4)
            out: Tensor = dit(
                latents,
                Times(torch.stack([t, 0 * t]).float(), index),
                attention.slots,
                Detached(attention),
            )
            return out.reshape(2, 1, 16).double()

        found.append(log_density(velocity, block.reshape(2, 1, 16).double(), config))
        attention = CachedAttention(cache, inside)
        dit(block, Times(torch.zeros(2), index), attention.slots, attention)
        cache.commit([4, 4])
    assert torch.allclose(torch.cat(found, dim=1), block_log_densities(dit, z_0, config), atol=1e-5)


class Detached:
    """The cache's attention with the new keys out of place, as a gradient through them needs."""

    def __init__(self, attention: CachedAttention) -> None:
        self.attention = attention

    def layer(self, index: int) -> LayerAttention:
        return functools.partial(self.attend, index)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = self.attention.cache.lengths[0]
        keys, values = (
            held[layer][:, :length].transpose(1, 2)
            for held in (self.attention.cache.keys, self.attention.cache.values)
        )
        return torch.nn.functional.scaled_dot_product_attention(
            q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        )


def test_documents_apart_are_rows_of_their_own() -> None:
    dit, z_0 = quiet_dit(), random_latents(1, 12, 4, seed=9)
    config = dataclasses.replace(EXACT, num_steps=4)
    document = torch.tensor([[0] * 4 + [1] * 8])
    apart = block_log_densities(dit, z_0, config, document)
    alone = [block_log_densities(dit, part, config) for part in (z_0[:, :4], z_0[:, 4:])]
    assert torch.allclose(apart, torch.cat(alone, dim=1), atol=1e-5)
    assert float((apart - block_log_densities(dit, z_0, config))[0, 1:].abs().min()) > 1e-3


@pytest.mark.parametrize("history", [0, 2])
def test_a_block_of_one_coordinate_integrates_to_1(history: int) -> None:
    dit = quiet_dit(block_size=1, txt_in_channels=1, txt_out_channels=1)
    z = torch.linspace(-10, 10, 400)
    before = random_latents(1, history, 1, seed=10).expand(400, history, 1)
    config = dataclasses.replace(EXACT, num_steps=48)
    density = block_log_densities(dit, torch.cat([before, z[:, None, None]], dim=1), config)[
        :, -1
    ].exp()
    assert float(torch.trapezoid(density, z.double())) == pytest.approx(1, abs=2e-3)
    # It is no standard normal that would do so without a transport.
    assert (
        float((density.log() + 0.5 * z.double().square() + 0.5 * np.log(2 * np.pi)).abs().max())
        > 0.3
    )


@pytest.mark.parametrize(("block_size", "channels", "num_points"), [(2, 1, 49), (1, 2, 97)])
def test_a_block_of_two_coordinates_integrates_to_1(
    block_size: int, channels: int, num_points: int
) -> None:
    dit = quiet_dit(block_size=block_size, txt_in_channels=channels, txt_out_channels=channels)
    axis = torch.linspace(-8, 8, num_points)
    grid = torch.cartesian_prod(axis, axis).reshape(-1, block_size, channels)
    density = (
        block_log_densities(dit, grid, dataclasses.replace(EXACT, num_steps=16))
        .exp()
        .reshape(num_points, num_points)
    )
    total = torch.trapezoid(torch.trapezoid(density, axis.double()), axis.double())
    assert float(total) == pytest.approx(1, abs=2e-3)

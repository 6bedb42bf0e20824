"""Yardsticks' nats against the entropies of the mixtures that they take latents for."""

import math

import pytest
import torch
from torch import Tensor

from cola_train.families.cola.denoising_bound import latent_rates, stratified
from cola_train.families.cola.yardsticks.denoisers import Blocks, bigram_velocity, unigram_velocity
from cola_train.models.codebook import Codebook
from cola_train.models.text_vae import Posterior
from tests.helpers.tiny import random_latents
from tests.likelihood.test_token_tables import NUMBER, counted_model, dense_table

CHANNELS, SIZE, ROWS, DRAWS = 2, 3, 2000, 64
CODES = 1.5 * random_latents(NUMBER, CHANNELS, seed=3).double()
VARIANCE = torch.tensor([0.02, 0.3]).double()


def chain_tokens() -> tuple[Tensor, Tensor]:
    """A token before each block, and a block's, of the chain that is counted."""
    p, table = dense_table()
    generator = torch.Generator().manual_seed(9)
    chain = [torch.multinomial(p, ROWS, True, generator=generator)]
    for _ in range(SIZE):
        chain.append(torch.multinomial(table[chain[-1]], 1, generator=generator)[:, 0])
    return chain[0], torch.stack(chain[1:], dim=1)


def log_normal(z: Tensor, mean: Tensor) -> Tensor:
    """log N(z; mean, VARIANCE) over channels."""
    square = (z - mean).square() / VARIANCE + VARIANCE.log() + math.log(2 * math.pi)
    return -0.5 * square.sum(-1)


def log_p_of_sequences(order: str, before: Tensor) -> Tensor:
    """log p of all sequences of a block's tokens, (rows, tokens, tokens, tokens)."""
    p, table = (x.log() for x in dense_table())
    if order == "unigram":
        return (p[:, None, None] + p[:, None] + p)[None]
    return table[before][..., None, None] + table[:, :, None] + table


def enumerated(z_0: Tensor, log_p: Tensor) -> Tensor:
    """log p(z_0) of each block, by the sum over all sequences of its tokens."""
    first, second, third = log_normal(z_0[:, :, None], CODES).unbind(1)
    joint = first[:, :, None, None] + second[:, None, :, None] + third[:, None, None]
    return (joint + log_p).flatten(1).logsumexp(1)


def by_the_bound(order: str, before: Tensor, tokens: Tensor) -> Tensor:
    """The bound's mean of each block, nats: at most KL of its latents from the mixture."""
    model = counted_model()[1]
    codebook = Codebook(CODES, model.p.log(), VARIANCE)
    mean = CODES[tokens]
    posterior = Posterior(mean, VARIANCE.log().expand_as(mean))
    nowhere = torch.zeros(ROWS, SIZE, dtype=torch.bool)

    def velocity(z_t: Tensor, t: Tensor) -> Tensor:
        times = t.repeat_interleave(SIZE, dim=1)
        blocks = Blocks(z_t.double(), times, before, nowhere, ~nowhere)
        if order == "unigram":
            return unigram_velocity(codebook, blocks)
        return bigram_velocity(codebook, model, blocks)

    total = torch.zeros(ROWS).double()
    for number in range(DRAWS):
        offsets = torch.rand(ROWS, generator=torch.Generator().manual_seed(number))
        quantiles = stratified(offsets, torch.full((ROWS,), float(number)), DRAWS, 1)
        z_0 = posterior.sample(random_latents(ROWS, SIZE, CHANNELS, seed=100 + number).double())
        noise = random_latents(ROWS, SIZE, CHANNELS, seed=200 + number)
        total += latent_rates(velocity, posterior, z_0, noise, quantiles).sum(1)
    return total / DRAWS


@pytest.mark.parametrize("order", ["unigram", "bigram"])
def test_a_yardsticks_bound_is_the_divergence_from_its_own_mixture(order: str) -> None:
    """Its denoiser is the best of the mixture, so the bound is equal, by all 512 sequences."""
    before, tokens = chain_tokens()
    log_p = log_p_of_sequences(order, before)
    assert torch.allclose(log_p.exp().sum((1, 2, 3)), torch.ones(1).double())
    truth = torch.zeros(ROWS).double()
    for number in range(DRAWS):
        eps = random_latents(ROWS, SIZE, CHANNELS, seed=100 + number).double()
        z_0 = CODES[tokens] + VARIANCE.sqrt() * eps
        truth += (log_normal(z_0, CODES[tokens]).sum(1) - enumerated(z_0, log_p)) / DRAWS
    found = by_the_bound(order, before, tokens)
    above = found - truth
    error = float(above.std()) / ROWS**0.5
    print(order, float(found.mean()), float(truth.mean()), float(above.mean()), error)
    assert error < 0.02
    assert abs(float(above.mean())) < 3 * error
    # Codes overlap: latents tell less than tokens are worth.
    nats = -log_p.expand(ROWS, -1, -1, -1)[(torch.arange(ROWS), *tokens.T)]
    assert float(truth.mean()) < float(nats.mean()) - 0.1

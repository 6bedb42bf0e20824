"""Clean latents as tokens, against Bayes' rule, and a DiT that reads them so."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cola_train.models import code_embedding
from cola_train.models.code_embedding import CodeEmbedding
from cola_train.models.codebook import Codebook
from cola_train.models.modulation import Times
from tests.helpers.tiny import VAE_CONFIG, randomize, tiny_dit

VOCAB, CHANNELS, WIDTH = 9, 3, 5


def codebook(seed: int) -> Codebook:
    generator = torch.Generator().manual_seed(seed)
    return Codebook(
        torch.randn(VOCAB, CHANNELS, generator=generator),
        torch.randn(VOCAB, generator=generator).log_softmax(0),
        torch.tensor([0.02, 0.3, 1.5]),
    )


@given(st.integers(0, 1000), st.sampled_from([1 << 24, 2 * VOCAB]))
def test_a_clean_latent_is_read_as_its_likeliest_token(seed: int, most: int) -> None:
    book, embedding = codebook(seed), randomize(CodeEmbedding(WIDTH, VOCAB), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    latents = torch.randn(2, 4, CHANNELS, generator=generator)
    is_clean = torch.rand(2, 4, generator=generator) < 0.5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_embedding, "_MOST_LIKELIHOODS", most)
        found = embedding(latents, is_clean, book)
    scale = (2 * math.pi * book.variance.double()).sqrt()
    for row, place in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
        away = latents[row, place].double() - book.codes.double()
        density = ((-0.5 * away.square() / book.variance.double()).exp() / scale).prod(-1)
        token = int((density * book.log_p.double().exp()).argmax())
        wanted = embedding.tokens.weight[token] if is_clean[row, place] else torch.zeros(WIDTH)
        assert torch.equal(found[row, place], wanted)


def test_what_a_token_of_the_history_is_moves_what_follows_and_nothing_else() -> None:
    dit = tiny_dit(
        head="codebook", vocab_size=VAE_CONFIG.vocab_size, block_size=1, embeds_codes=True
    )
    assert dit.codebook is not None
    assert dit.code_embedding is not None
    generator = torch.Generator().manual_seed(6)
    dit.codebook.codes.normal_(generator=generator)
    tokens = torch.arange(8)[None]
    z_0 = dit.codebook.codes[tokens]
    z_t = torch.randn(1, 8, 4, generator=generator)
    times = Times(torch.cat([torch.linspace(0.3, 1, 8), torch.zeros(1)]), torch.arange(8)[None])
    with torch.no_grad():
        before = dit.velocity_and_nats(z_t, z_0, times, tokens)[1]
        dit.code_embedding.tokens.weight[3, 0] += 1
        after = dit.velocity_and_nats(z_t, z_0, times, tokens)[1]
        # A token that is a noised latent's nearest code, and no history's.
        dit.code_embedding.tokens.weight[20, 0] += 1
        assert torch.equal(dit.velocity_and_nats(z_t, z_0, times, tokens)[1], after)
    assert torch.equal(before[0, :4], after[0, :4])
    assert (before[0, 4:] != after[0, 4:]).all()

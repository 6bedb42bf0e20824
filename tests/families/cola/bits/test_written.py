"""The written networks against Bayes: codebooks whose posterior is known in closed form."""

import functools
import itertools

import torch

from cola_train.families.cola.bits.codes import BitCodes
from cola_train.families.cola.bits.dit import BitDenoiser
from cola_train.families.cola.bits.sizes import least_units, least_width
from cola_train.families.cola.bits.vae import _CAUTION, written_vae_value
from cola_train.models.codebook import Codebook
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.models.dit import BlockCausalDiT, Times
from cola_train.models.initialize import dit_value, text_vae_value
from cola_train.models.text_vae import TextVAE

LOG_SNR = 2.75
BITS = 6


def all_words(log_odds: torch.Tensor) -> BitCodes:
    """Every word of bits, each bit a coin of its own."""
    bits = torch.tensor(list(itertools.product((1.0, -1.0), repeat=BITS)))
    amplitude = torch.linspace(1.4, 0.6, BITS)
    amplitude = amplitude / amplitude.square().mean().sqrt()
    log_p = torch.nn.functional.logsigmoid(bits * log_odds).sum(1)
    return BitCodes(bits, amplitude, log_odds, log_p)


def written_dit(codes: BitCodes, block_size: int = 1) -> BlockCausalDiT:
    channels = 2 * codes.bits.shape[1]
    config = DiTConfig(
        txt_in_channels=channels,
        txt_out_channels=channels,
        txt_dim=96,
        emb_dim=96,
        heads=2,
        head_dim=16,
        rope_dim=8,
        num_layers=2,
        block_size=block_size,
    )
    assert config.txt_dim >= least_width(channels)
    assert config.txt_dim * config.expand_ratio >= least_units(channels)
    dit = BlockCausalDiT(config)
    shapes = {name: value.shape for name, value in dit.named_parameters()}
    draw = functools.partial(dit_value, seed=3)
    denoiser = BitDenoiser(config, codes, LOG_SNR, shapes, draw)
    with torch.no_grad():
        for name, value in dit.named_parameters():
            value.copy_(denoiser.value(name))
    return dit


def test_where_bits_are_independent_the_written_dit_is_the_best_denoiser() -> None:
    codes = all_words(torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 3.0]))
    log_p = codes.log_p
    book = Codebook(codes.codes, log_p, torch.full((2 * BITS,), torch.tensor(-LOG_SNR).exp()))
    dit = written_dit(codes)
    generator = torch.Generator().manual_seed(5)
    rows, seq = 41, 64
    tokens = torch.multinomial(log_p.exp(), rows * seq, True, generator=generator).view(rows, seq)
    mean, shape = codes.codes[tokens], (rows, seq, 2 * BITS)
    z_0 = mean + book.variance.sqrt() * torch.randn(shape, generator=generator)
    z_1 = torch.randn(shape, generator=generator)
    t = torch.linspace(0.01, 1, rows)
    z_t = (1 - t)[:, None, None] * z_0 + t[:, None, None] * z_1
    times = Times(torch.cat([t, t.new_zeros(1)]), torch.arange(rows)[:, None].expand(rows, seq))
    with torch.no_grad():
        found = dit.velocity(z_t, z_0, times)
    flat, each = z_t.flatten(0, 1), t.repeat_interleave(seq)
    best = book.velocity(flat, each, book.mean_code(flat, each, log_p[None])).view(shape)
    target = z_1 - z_0

    def loss(velocity: torch.Tensor) -> torch.Tensor:
        return (velocity - target).square().mean((1, 2))

    assert (loss(found) - loss(best)).abs().max() < 0.12
    assert (loss(found) - loss(best)).mean().abs() < 0.03
    # One code, with the mean and the variance of all latents, is far from it.
    prior, all_mean = log_p.exp(), log_p.exp() @ codes.codes
    spread = prior @ (codes.codes - all_mean).square() + book.variance
    gaussian = Codebook(all_mean[None], torch.zeros(1), spread)
    plain = gaussian.velocity(flat, each, all_mean.expand(len(flat), -1)).view(shape)
    assert (loss(plain) - loss(best)).mean() > 0.25


def test_history_and_neighbors_do_not_matter_yet() -> None:
    codes = all_words(torch.zeros(BITS))
    dit = written_dit(codes, block_size=4)
    generator = torch.Generator().manual_seed(6)
    z_t, one, other = torch.randn(3, 2, 8, 2 * BITS, generator=generator)
    times = Times(torch.tensor([0.5, 0.0]), torch.zeros(2, 8, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(dit.velocity(z_t, one, times), dit.velocity(z_t, other, times))


def test_the_written_vae_reads_codes_as_bayes_does() -> None:
    codes = all_words(torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0, 3.0]))
    config = TextVAEConfig(
        vocab_size=2**BITS,
        encoder_num_blocks=2,
        decoder_num_blocks=2,
        dim=24,
        ffn_dim=32,
        latent_dim=2 * BITS,
        num_heads=2,
        block_size=1,
    )
    vae = TextVAE(config)
    with torch.no_grad():
        for name, value in vae.named_parameters():
            drawn = text_vae_value(name, value.shape, config, 7)
            value.copy_(written_vae_value(name, drawn, config, codes, LOG_SNR))
    tokens = torch.randperm(2**BITS, generator=torch.Generator().manual_seed(8)).view(4, 16)
    with torch.no_grad():
        posterior = vae.encode(tokens)
        assert (posterior.mean - codes.codes[tokens]).abs().max() < 1e-5
        assert (posterior.logvar + LOG_SNR).abs().max() < 1e-5
        z_0 = posterior.sample(torch.randn(posterior.mean.shape))
        # Of the usual length, for which the logits are written.
        usual = (2 * BITS * (1 + torch.tensor(-LOG_SNR).exp())).sqrt()
        z_0 = z_0 / z_0.norm(dim=-1, keepdim=True) * usual
        variance = torch.full((2 * BITS,), torch.tensor(-LOG_SNR).exp())
        book = Codebook(codes.codes, codes.log_p, _CAUTION * variance)
        likelihood = book.log_likelihood(z_0.flatten(0, 1), torch.zeros(64))
        exact = (likelihood + codes.log_p).log_softmax(-1)
        found = vae.decode(z_0).log_softmax(-1).flatten(0, 1)
    # The norm takes a mean off, which is that of the noise alone.
    assert (found.exp() - exact.exp()).abs().max() < 0.02
    # Blocks pass on what they read, and can learn: gradients reach what was drawn in two steps.
    vae.decode(vae.encode(tokens).mean).square().mean().backward()
    added = vae.decoder.blocks[0].get_parameter("ffn_out.weight").grad
    assert added is not None
    assert added.abs().max() > 0

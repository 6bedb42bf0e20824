"""What generating text with Cola DLM costs, from the networks' configs alone."""

from cola_train.config.sampling import SamplerConfig
from cola_train.families.cola.flops import decoder_pass, dit_pass, encoder_pass
from cola_train.flops.passes import Span, added, named, row_pairs, times, visible_pairs
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.solvers import network_calls, time_grid

Networks = tuple[TextVAEConfig, DiTConfig]


def generation_work(networks: Networks, sampler: SamplerConfig, prompt: int, batch: int) -> Parts:
    """Whole blocks of the prompt fill the caches; then every block is transported, decoded and, if
    another follows, committed.
    """
    patch_size, block_size = networks[0].patch_size, networks[1].block_size
    block_tokens = patch_size * block_size
    latents = -(-prompt // patch_size)
    history = latents // block_size
    known_tokens = max(0, prompt - history * block_tokens)
    num_blocks = -(-(known_tokens + sampler.max_new_tokens) // block_tokens)

    read = max(1, -(-prompt // block_tokens)) * block_size
    encoder = Span.all_read(read * batch, row_pairs(read, networks[0].block_size) * batch)
    vae = named("vae.encoder", encoder_pass(networks[0], encoder, NO_BACKWARD))
    passes = [vae, _time_modulations(networks, sampler, reads_clean=prompt > 0 or num_blocks > 1)]
    if history:
        filled = history * block_size
        pairs = row_pairs(filled, networks[0].block_size) * batch
        decoder = decoder_pass(
            networks[0], Span.none_read(filled * batch, pairs), Extent.of(0), NO_BACKWARD
        )
        passes += [
            named("vae.decoder", decoder),
            _commit(networks, row_pairs(filled, block_size), filled, batch),
        ]
    grid = time_grid(sampler.num_steps)
    moments = [grid[place] for place in network_calls(sampler.solver, sampler.num_steps)]
    for block in range(num_blocks):
        before = (history + block) * block_size
        guided = sum(before > 0 and sampler.guides_at(t) for t in moments)
        passes.append(times(_velocity(networks, before, batch, guided=True), guided))
        passes.append(
            times(_velocity(networks, before, batch, guided=False), len(moments) - guided)
        )
        passes.append(_decode(networks, before, batch))
        if block < num_blocks - 1:
            passes.append(
                _commit(networks, Extent.of(block_size * (before + block_size)), block_size, batch)
            )
    return added(*passes)


def _time_modulations(networks: Networks, sampler: SamplerConfig, reads_clean: bool) -> Parts:
    """adaLN, once for every time of the grid; the last, t = 0, is that of known latents and of
    blocks that fill the cache.
    """
    distinct = Extent(sampler.num_steps + reads_clean, sampler.num_steps + 1)
    nothing = Span.all_read(0, Extent.of(0))
    return named("dit", dit_pass(networks[1], nothing, distinct, NO_BACKWARD, input_gradient=False))


def _velocity(networks: Networks, before: int, batch: int, guided: bool) -> Parts:
    """A network call of the solver; guided, an unconditional branch that sees the block alone goes
    along.
    """
    size = networks[1].block_size
    pairs = Extent.of(batch * size * (before + size + size * guided))
    span = Span.all_read(batch * size * (1 + guided), pairs)
    return named(
        "dit", dit_pass(networks[1], span, Extent.of(0), NO_BACKWARD, input_gradient=False)
    )


def _commit(networks: Networks, pairs: Extent, positions: int, batch: int) -> Parts:
    """One clean pass whose keys and values stay in the DiT's cache; the last block computes nothing
    else.
    """
    span = Span(Extent.of(positions) * batch, pairs * batch, Extent.of(0), Extent.of(0))
    return named(
        "dit", dit_pass(networks[1], span, Extent.of(0), NO_BACKWARD, input_gradient=False)
    )


def _decode(networks: Networks, before: int, batch: int) -> Parts:
    size = networks[1].block_size
    pairs = (
        Extent(size * before + visible_pairs(size, networks[0].block_size), size * (before + size))
        * batch
    )
    span = Span.all_read(batch * size, pairs)
    logits = Extent.of(batch * size * networks[0].patch_size)
    return named("vae.decoder", decoder_pass(networks[0], span, logits, NO_BACKWARD))

"""What generating text with Cola DLM costs, from the networks' configs alone."""

from cola_train.config.sampling import SamplerConfig
from cola_train.families.cola.flops import decoder_pass, dit_pass, encoder_pass
from cola_train.families.cola.prefix import Prefix
from cola_train.flops.passes import Span, added, named, row_pairs, times, visible_pairs
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.solvers import network_calls, time_grid


def generation_work(
    vae: TextVAEConfig, dit: DiTConfig, sampler: SamplerConfig, prompt: int, batch: int
) -> Parts:
    """FLOPs of continuing `batch` prompts of `prompt` tokens by max_new_tokens, none ending early.

    Whole blocks of the prompt fill the caches; then every block is transported, decoded and, if
    another follows, committed.
    """
    size, prefix = dit.block_size, Prefix(prompt, vae.patch_size, dit.block_size)
    num_blocks = prefix.generated_blocks(sampler.max_new_tokens)

    read = max(1, -(-prompt // prefix.block_tokens)) * size
    encoder = Span.all_read(read * batch, row_pairs(read, vae.block_size) * batch)
    # adaLN runs once for every time of the grid; the last, t = 0, is that of known latents and of
    # blocks that fill the cache.
    reads_clean = prompt > 0 or num_blocks > 1
    distinct = Extent(sampler.num_steps + reads_clean, sampler.num_steps + 1)
    passes = [
        named("vae.encoder", encoder_pass(vae, encoder, NO_BACKWARD)),
        _dit(dit, Span.all_read(0, Extent.of(0)), distinct),
    ]
    if prefix.history_blocks:
        filled = prefix.history_blocks * size
        span = Span.none_read(filled * batch, row_pairs(filled, vae.block_size) * batch)
        decoder = decoder_pass(vae, span, Extent.of(0), NO_BACKWARD)
        passes.append(named("vae.decoder", decoder))
        passes.append(_commit(dit, row_pairs(filled, size), filled, batch))
    grid = time_grid(sampler.num_steps)
    moments = [grid[place] for place in network_calls(sampler.solver, sampler.num_steps)]
    for block in range(num_blocks):
        before = (prefix.history_blocks + block) * size
        guided = sum(before > 0 and sampler.guides_at(t) for t in moments)
        passes.append(times(_velocity(dit, before, batch, guided=True), guided))
        passes.append(times(_velocity(dit, before, batch, guided=False), len(moments) - guided))
        passes.append(_decode(vae, size, before, batch))
        if block < num_blocks - 1:
            passes.append(_commit(dit, Extent.of(size * (before + size)), size, batch))
    return added(*passes)


def _dit(dit: DiTConfig, span: Span, distinct_times: Extent) -> Parts:
    return named("dit", dit_pass(dit, span, distinct_times, NO_BACKWARD, input_gradient=False))


def _velocity(dit: DiTConfig, before: int, batch: int, guided: bool) -> Parts:
    """A network call of the solver; if guided, with an unconditional branch that has no history."""
    size = dit.block_size
    pairs = Extent.of(batch * size * (before + size + size * guided))
    return _dit(dit, Span.all_read(batch * size * (1 + guided), pairs), Extent.of(0))


def _commit(dit: DiTConfig, pairs: Extent, positions: int, batch: int) -> Parts:
    """A clean pass for its keys and values alone: nothing else of the last layer is computed."""
    span = Span(Extent.of(positions) * batch, pairs * batch, Extent.of(0), Extent.of(0))
    return _dit(dit, span, Extent.of(0))


def _decode(vae: TextVAEConfig, size: int, before: int, batch: int) -> Parts:
    """The decoder on a block of `size` latents after `before` others."""
    useful = size * before + visible_pairs(size, vae.block_size)
    span = Span.all_read(batch * size, Extent(useful, size * (before + size)) * batch)
    logits = Extent.of(batch * size * vae.patch_size)
    return named("vae.decoder", decoder_pass(vae, span, logits, NO_BACKWARD))

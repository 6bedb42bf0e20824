"""How large Cola DLM's networks are, and what training and generating cost, from configs alone."""

import functools
from collections.abc import Mapping

from cola_train.config.sampling import SamplerConfig
from cola_train.families.cola.config import Stage2RunConfig, VAERunConfig
from cola_train.families.cola.prefix import Prefix
from cola_train.flops.passes import (
    Block,
    Span,
    added,
    named,
    row_pairs,
    stack,
    times,
    visible_pairs,
)
from cola_train.flops.work import NO_BACKWARD, Backward, Extent, Linear, Parts, product
from cola_train.models.attention.tiles import packed_tiles
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.solvers import network_calls, time_grid

# Sine and cosine of 128 frequencies: what the DiT's time embedding reads (models/dit.py).
TIME_CHANNELS = 256


@functools.lru_cache
def vae_parameters(config: TextVAEConfig) -> Mapping[str, int]:
    """Parameters of the Text VAE by part, counted on meta tensors."""
    from cola_train.models.blocks import parameters_by_part
    from cola_train.models.text_vae import TextVAE

    encoder = parameters_by_part(lambda: TextVAE(config).encoder)
    decoder = parameters_by_part(lambda: TextVAE(config).decoder)
    return named("vae.encoder", encoder) | named("vae.decoder", decoder)


@functools.lru_cache
def dit_parameters(config: DiTConfig) -> Mapping[str, int]:
    """Parameters of the DiT by part, counted on meta tensors."""
    from cola_train.models.blocks import parameters_by_part
    from cola_train.models.dit import BlockCausalDiT

    return named("dit", parameters_by_part(lambda: BlockCausalDiT(config)))


def vae_work(config: VAERunConfig | Stage2RunConfig) -> Parts:
    """An optimizer step's `vae_pass` over all its rows: stage 1, and the VAE's part of stage 2.

    Encoder and decoder run on clean and masked copies, the head at counted tokens.
    """
    rows, seq, objective = config.trainer.global_batch_size, config.data.seq_len, config.objective
    masks = objective.mask_weight > 0
    # As many as `mask_positions` gives, whatever a row has of padding.
    masked = max(1, round(objective.mask_ratio * seq)) if masks else 0
    span = _clean_rows(config, 2 * rows if masks else rows)
    backward = _backward(config)
    encoder = encoder_pass(config.vae, span, backward)
    decoder = decoder_pass(config.vae, span, Extent.of(rows * (seq + masked)), backward)
    return named("vae.encoder", encoder) | named("vae.decoder", decoder)


def stage2_work(config: Stage2RunConfig, trains_vae: bool, teacher: DiTConfig | None) -> Parts:
    """One optimizer step of stage 2 over all its rows; in frozen phases the VAE only encodes."""
    backward = _backward(config)
    if not trains_vae:
        parts = _encoder_alone(config, "vae.encoder")
    else:
        parts = vae_work(config)
        if config.objective.reference_weight > 0:
            parts |= _encoder_alone(config, "reference_encoder")
    if teacher is not None:
        parts |= named("teacher", _dit(config, teacher, NO_BACKWARD, trains_vae=False))
    return parts | named("dit", _dit(config, config.dit, backward, trains_vae))


def _backward(config: VAERunConfig | Stage2RunConfig) -> Backward:
    return Backward(runs=True, recomputes_blocks=config.parallel.activation_checkpointing == "full")


def encoder_pass(config: TextVAEConfig, span: Span, backward: Backward) -> Parts:
    """The VAE's encoder; positions are latents."""
    dim = config.dim
    parts = stack(_vae_block(config), config.encoder_num_blocks, span, backward)
    # A convolution over patches of tokens, and the layer that gives mean and log-variance.
    patches, posterior = Linear(config.patch_size * dim, dim), Linear(dim, 2 * config.latent_dim)
    parts["linear"] += product(patches, span.positions, backward)
    parts["linear"] += product(posterior, span.outputs, backward)
    return parts


def decoder_pass(config: TextVAEConfig, span: Span, logits: Extent, backward: Backward) -> Parts:
    """The VAE's decoder; positions are latents, `logits` the tokens that the head runs on."""
    dim = config.dim
    parts = stack(_vae_block(config), config.decoder_num_blocks, span, backward)
    # The first layer reads latents; the last one gives each latent's tokens.
    latents, tokens = Linear(config.latent_dim, dim), Linear(dim, config.patch_size * dim)
    parts["linear"] += product(latents, span.positions, backward)
    parts["linear"] += product(tokens, span.outputs, backward)
    return parts | {"head": product(Linear(dim, config.vocab_size), logits, backward)}


def dit_pass(
    config: DiTConfig, span: Span, times: Extent, backward: Backward, input_gradient: bool
) -> Parts:
    """The DiT; adaLN and the time embedding run once per distinct time, `times` in all.

    `input_gradient`: whether the latents that it reads need a gradient.
    """
    dim, embedding = config.txt_dim, config.emb_dim
    mlp = (Linear(dim, dim * config.expand_ratio), Linear(dim * config.expand_ratio, dim))
    # A block without its adaLN layers.
    block = Block(dim, config.heads * config.head_dim, mlp, ends_with_product=False)
    parts = stack(block, config.num_layers, span, backward)
    channels = config.txt_out_channels
    parts["linear"] += product(Linear(channels, dim), span.positions, backward, input_gradient)
    if config.vocab_size is None:
        parts["linear"] += product(Linear(dim, channels), span.outputs, backward)
    else:
        # How far each code is (two products), and the mean of codes; none of them is trained.
        codes = Linear(channels, config.vocab_size)
        to_latents = backward if input_gradient else NO_BACKWARD
        near = product(codes, span.outputs, to_latents, input_gradient=False)
        mean = product(codes, span.outputs, backward, input_gradient=False)
        logits = product(Linear(dim, config.vocab_size), span.outputs, backward)
        parts |= {"head": logits + mean + near * 2}
        if config.embeds_codes:
            # How far each code is, at all positions, though only clean ones read it.
            parts["head"] += product(codes, span.positions, NO_BACKWARD) * 2
    # A block's four adaLN layers as one: shift, scale and gate of attention and of the MLP.
    modulation = product(Linear(embedding, 6 * dim), times, backward)
    if backward.recomputes_blocks:
        modulation = modulation.computed_again()
    adaln = modulation * config.num_layers
    # The time embedding, whose first layer has no layer before it, and the last norm's shift and
    # scale.
    adaln += product(Linear(TIME_CHANNELS, dim), times, backward, input_gradient=False)
    for layer in (Linear(dim, dim), Linear(dim, embedding), Linear(embedding, 2 * dim)):
        adaln += product(layer, times, backward)
    return parts | {"adaln": adaln}


def _clean_rows(config: VAERunConfig | Stage2RunConfig, rows: int) -> Span:
    """Rows of latents through the VAE."""
    latents = config.data.seq_len // config.vae.patch_size
    pairs = row_pairs(latents, config.vae.block_size, config.objective.mask_documents)
    return Span.all_read(rows * latents, pairs * rows)


def _encoder_alone(config: Stage2RunConfig, name: str) -> Parts:
    span = _clean_rows(config, config.trainer.global_batch_size)
    return named(name, encoder_pass(config.vae, span, NO_BACKWARD))


def _dit(config: Stage2RunConfig, dit: DiTConfig, backward: Backward, trains_vae: bool) -> Parts:
    """`BlockCausalDiT.velocity`: the blocks of each noised copy of a row, after its clean blocks.

    The last clean block is nobody's history and left out.
    """
    rows, flow = config.trainer.global_batch_size, config.objective.flow
    block_size = config.dit.block_size
    latents = config.data.seq_len // config.vae.patch_size
    clean, noised = latents - block_size, flow.noise_copies * latents
    # A noised block sees itself and all clean blocks before it: as many pairs as if all were clean.
    noised_pairs = flow.noise_copies * visible_pairs(latents, block_size)
    pairs = visible_pairs(clean, block_size) + noised_pairs
    tiles = packed_tiles(latents, block_size, flow.noise_copies)
    tile_pairs = sum(tile.pairs for tile in tiles)
    noised_tile_pairs = sum(tile.pairs for tile in tiles if tile.queries[0] < noised)
    span = Span(
        positions=Extent.of(clean + noised) * rows,
        pairs=Extent(pairs, tile_pairs) * rows,
        outputs=Extent.of(noised) * rows,
        output_pairs=Extent(noised_pairs, noised_tile_pairs) * rows,
    )
    times_per_copy = latents // block_size if flow.timestep_per == "block" else 1
    drawn = rows * flow.noise_copies * times_per_copy
    # Beside the times that are drawn there is that of clean positions, 0.
    distinct = Extent(drawn + 1, drawn + rows // config.trainer.micro_batch_size)
    return dit_pass(
        dit, span, distinct, backward, input_gradient=trains_vae and flow.grad_to_encoder
    )


def _vae_block(config: TextVAEConfig) -> Block:
    mlp = (Linear(config.dim, config.ffn_dim), Linear(config.ffn_dim // 2, config.dim))
    return Block(config.dim, config.dim, mlp, ends_with_product=not config.post_norm)


def generation_work(
    vae: TextVAEConfig, dit: DiTConfig, sampler: SamplerConfig, prompt: int, batch: int
) -> Parts:
    """FLOPs of continuing `batch` prompts of `prompt` tokens by max_new_tokens, none ending early.

    Whole blocks of the prompt fill the caches; then every block is transported, decoded and, if
    another follows, committed, with history=reencoded after its tokens are encoded.
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
        _cached(dit, Span.all_read(0, Extent.of(0)), distinct),
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
            if sampler.history == "reencoded":
                passes += _reencode(vae, size, before, batch)
    return added(*passes)


def _cached(dit: DiTConfig, span: Span, distinct_times: Extent) -> Parts:
    return named("dit", dit_pass(dit, span, distinct_times, NO_BACKWARD, input_gradient=False))


def _velocity(dit: DiTConfig, before: int, batch: int, guided: bool) -> Parts:
    """A network call of the solver; if guided, with an unconditional branch that has no history."""
    size = dit.block_size
    pairs = Extent.of(batch * size * (before + size + size * guided))
    return _cached(dit, Span.all_read(batch * size * (1 + guided), pairs), Extent.of(0))


def _commit(dit: DiTConfig, pairs: Extent, positions: int, batch: int) -> Parts:
    """A clean pass for its keys and values alone: nothing else of the last layer is computed."""
    span = Span(Extent.of(positions) * batch, pairs * batch, Extent.of(0), Extent.of(0))
    return _cached(dit, span, Extent.of(0))


def _reencode(vae: TextVAEConfig, size: int, before: int, batch: int) -> list[Parts]:
    """Encoder, and decoder for its keys and values alone, on a block's tokens after `before`."""
    pairs = _block_pairs(vae, size, before, batch)
    encoded = encoder_pass(vae, Span.all_read(batch * size, pairs), NO_BACKWARD)
    span = Span.none_read(batch * size, pairs)
    decoded = decoder_pass(vae, span, Extent.of(0), NO_BACKWARD)
    return [named("vae.encoder", encoded), named("vae.decoder", decoded)]


def _block_pairs(vae: TextVAEConfig, size: int, before: int, batch: int) -> Extent:
    useful = size * before + visible_pairs(size, vae.block_size)
    return Extent(useful, size * (before + size)) * batch


def _decode(vae: TextVAEConfig, size: int, before: int, batch: int) -> Parts:
    """The decoder on a block of `size` latents after `before` others."""
    span = Span.all_read(batch * size, _block_pairs(vae, size, before, batch))
    logits = Extent.of(batch * size * vae.patch_size)
    return named("vae.decoder", decoder_pass(vae, span, logits, NO_BACKWARD))

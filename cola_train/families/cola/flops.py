"""How large Cola DLM's networks are, and what training steps cost, from the run's config alone."""

import functools
from collections.abc import Mapping

import torch

from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.flops.passes import Block, Span, named, row_pairs, stack, visible_pairs
from cola_train.flops.work import NO_BACKWARD, Backward, Extent, Linear, Parts, product
from cola_train.models.attention.tiles import packed_tiles
from cola_train.models.blocks import parameters_by_part
from cola_train.models.config import DiTConfig, TextVAEConfig
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE

# Sine and cosine of 128 frequencies: what the DiT's time embedding reads (models/dit.py).
TIME_CHANNELS = 256


@functools.lru_cache
def vae_parameters(config: TextVAEConfig) -> Mapping[str, int]:
    """Parameters of the Text VAE by part, counted on meta tensors."""
    with torch.device("meta"):
        vae = TextVAE(config)
    encoder, decoder = parameters_by_part(vae.encoder), parameters_by_part(vae.decoder)
    return named("vae.encoder", encoder) | named("vae.decoder", decoder)


@functools.lru_cache
def dit_parameters(config: DiTConfig) -> Mapping[str, int]:
    """Parameters of the DiT by part, counted on meta tensors."""
    with torch.device("meta"):
        return named("dit", parameters_by_part(BlockCausalDiT(config)))


def stage1_work(config: VAERunConfig) -> Parts:
    """One optimizer step of stage 1 over all its rows."""
    return _vae(config, _backward(config))


def stage2_work(config: JointRunConfig, trains_vae: bool) -> Parts:
    """One optimizer step of stage 2 over all its rows; in frozen phases the VAE only encodes."""
    backward = _backward(config)
    if not trains_vae:
        parts = _encoder_alone(config, "vae.encoder")
    else:
        parts = _vae(config, backward)
        if config.objective.reference_weight > 0:
            parts |= _encoder_alone(config, "reference_encoder")
    return parts | named("dit", _dit(config, backward, trains_vae))


def _backward(config: VAERunConfig | JointRunConfig) -> Backward:
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
    parts = stack(_dit_block(config), config.num_layers, span, backward)
    latents, velocity = Linear(config.txt_in_channels, dim), Linear(dim, config.txt_out_channels)
    parts["linear"] += product(latents, span.positions, backward, input_gradient)
    parts["linear"] += product(velocity, span.outputs, backward)
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


def _clean_rows(config: VAERunConfig | JointRunConfig, rows: int) -> Span:
    """Rows of latents through the VAE."""
    latents = config.data.seq_len // config.vae.patch_size
    pairs = row_pairs(latents, config.vae.block_size, config.objective.mask_documents)
    return Span.all_read(rows * latents, pairs * rows)


def _vae(config: VAERunConfig | JointRunConfig, backward: Backward) -> Parts:
    """`vae_pass`: encoder and decoder on clean and masked copies, the head at counted tokens."""
    rows, seq, objective = config.trainer.global_batch_size, config.data.seq_len, config.objective
    masks = objective.mask_weight > 0
    # As many as `mask_positions` replaces.
    masked = max(1, round(objective.mask_ratio * seq)) if masks else 0
    span = _clean_rows(config, 2 * rows if masks else rows)
    encoder = encoder_pass(config.vae, span, backward)
    decoder = decoder_pass(config.vae, span, Extent.of(rows * (seq + masked)), backward)
    return named("vae.encoder", encoder) | named("vae.decoder", decoder)


def _encoder_alone(config: JointRunConfig, name: str) -> Parts:
    span = _clean_rows(config, config.trainer.global_batch_size)
    return named(name, encoder_pass(config.vae, span, NO_BACKWARD))


def _dit(config: JointRunConfig, backward: Backward, trains_vae: bool) -> Parts:
    """`BlockCausalDiT.velocity`: the blocks of each noised copy of a row, after its clean blocks.

    The last clean block is nobody's history and left out.
    """
    rows, flow, block_size = (
        config.trainer.global_batch_size,
        config.objective.flow,
        config.dit.block_size,
    )
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
        config.dit, span, distinct, backward, input_gradient=trains_vae and flow.grad_to_encoder
    )


def _vae_block(config: TextVAEConfig) -> Block:
    mlp = (Linear(config.dim, config.ffn_dim), Linear(config.ffn_dim // 2, config.dim))
    return _block(config.dim, config.dim, mlp, ends_with_product=not config.post_norm)


def _dit_block(config: DiTConfig) -> Block:
    """A block of the DiT without its adaLN layers."""
    dim, hidden = config.txt_dim, config.txt_dim * config.expand_ratio
    mlp = (Linear(dim, hidden), Linear(hidden, dim))
    return _block(dim, config.heads * config.head_dim, mlp, ends_with_product=False)


def _block(dim: int, inner: int, mlp: tuple[Linear, ...], ends_with_product: bool) -> Block:
    """A block of width `dim` whose attention heads are `inner` wide together."""
    query, keys_values, out = Linear(dim, inner), Linear(dim, 2 * inner), Linear(inner, dim)
    return Block(query, keys_values, out, mlp, ends_with_product)

"""What Cola DLM's networks and training steps cost, from the run's config alone."""

from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.flops.passes import Block, Span, named, row_pairs, stack, visible_pairs
from cola_train.flops.work import NO_BACKWARD, Backward, Extent, Linear, Parts, product
from cola_train.models.attention.tiles import packed_tiles
from cola_train.models.config import DiTConfig, TextVAEConfig

# Sine and cosine of 128 frequencies: what the DiT's time embedding reads (models/dit.py).
TIME_CHANNELS = 256


def stage1_work(config: VAERunConfig) -> Parts:
    """One optimizer step of stage 1 over all its rows."""
    return _vae(config, _backward(config))


def stage2_work(config: JointRunConfig, trains_vae: bool) -> Parts:
    """One optimizer step of stage 2 over all its rows; in frozen phases the VAE only encodes."""
    backward = _backward(config)
    vae = (
        _vae(config, backward) | _reference(config)
        if trains_vae
        else _encoder_alone(config, "vae.encoder")
    )
    return vae | named("dit", _dit(config, backward, trains_vae))


def _backward(config: VAERunConfig | JointRunConfig) -> Backward:
    return Backward(runs=True, recomputes_blocks=config.parallel.activation_checkpointing == "full")


def encoder_pass(config: TextVAEConfig, span: Span, backward: Backward) -> Parts:
    """The VAE's encoder; positions are latents."""
    parts = stack(_vae_block(config), config.encoder_num_blocks, span, backward)
    parts["linear"] += product(_vae_patch(config), span.positions, backward)
    parts["linear"] += product(_vae_posterior(config), span.outputs, backward)
    return parts


def decoder_pass(config: TextVAEConfig, span: Span, logits: Extent, backward: Backward) -> Parts:
    """The VAE's decoder; positions are latents, `logits` the tokens that the head runs on."""
    parts = stack(_vae_block(config), config.decoder_num_blocks, span, backward)
    parts["linear"] += product(_vae_latents_in(config), span.positions, backward)
    parts["linear"] += product(_vae_unpatch(config), span.outputs, backward)
    return parts | {"head": product(_vae_head(config), logits, backward)}


def dit_pass(
    config: DiTConfig, span: Span, times: Extent, backward: Backward, input_gradient: bool
) -> Parts:
    """The DiT; adaLN and the time embedding run once per distinct time, `times` in all.

    `input_gradient`: whether the latents that it reads need a gradient.
    """
    parts = stack(_dit_block(config), config.num_layers, span, backward)
    parts["linear"] += product(_dit_latents_in(config), span.positions, backward, input_gradient)
    parts["linear"] += product(_dit_velocity(config), span.outputs, backward)
    modulation = product(_dit_modulation(config), times, backward)
    adaln = (
        modulation.computed_again() if backward.recomputes_blocks else modulation
    ) * config.num_layers
    adaln += product(_dit_time_in(config), times, backward, input_gradient=False)
    for layer in _dit_time(config):
        adaln += product(layer, times, backward)
    return parts | {"adaln": adaln}


def _clean_rows(config: VAERunConfig | JointRunConfig, rows: int) -> Span:
    """Rows of latents through the VAE."""
    latents = config.data.seq_len // config.vae.patch_size
    pairs = row_pairs(latents, config.vae.block_size, config.objective.mask_documents)
    return Span.all_read(rows * latents, pairs * rows)


def _vae(config: VAERunConfig | JointRunConfig, backward: Backward) -> Parts:
    """`vae_pass`: clean and masked copies through encoder and decoder, the head at clean tokens and
    at masked ones.
    """
    rows, seq, objective = config.trainer.global_batch_size, config.data.seq_len, config.objective
    masks = objective.mask_weight > 0
    # As many as objectives/objective.py's mask_positions replaces.
    masked = max(1, round(objective.mask_ratio * seq)) if masks else 0
    span = _clean_rows(config, 2 * rows if masks else rows)
    encoder = encoder_pass(config.vae, span, backward)
    decoder = decoder_pass(config.vae, span, Extent.of(rows * (seq + masked)), backward)
    return named("vae.encoder", encoder) | named("vae.decoder", decoder)


def _encoder_alone(config: JointRunConfig, name: str) -> Parts:
    span = _clean_rows(config, config.trainer.global_batch_size)
    return named(name, encoder_pass(config.vae, span, NO_BACKWARD))


def _reference(config: JointRunConfig) -> Parts:
    return (
        _encoder_alone(config, "reference_encoder") if config.objective.reference_weight > 0 else {}
    )


def _dit(config: JointRunConfig, backward: Backward, trains_vae: bool) -> Parts:
    """`BlockCausalDiT.velocity`: all blocks of each noised copy of a row, and its clean blocks but
    the last as history.
    """
    rows, flow, block_size = (
        config.trainer.global_batch_size,
        config.objective.flow,
        config.dit.block_size,
    )
    latents = config.data.seq_len // config.vae.patch_size
    clean, copies = latents - block_size, flow.noise_copies
    # A noised block sees itself and all clean blocks before it: as many pairs as if all were clean.
    noised_pairs, clean_pairs = (
        copies * visible_pairs(latents, block_size),
        visible_pairs(clean, block_size),
    )
    tiles = packed_tiles(latents, block_size, copies)
    noised_tiles = [tile for tile in tiles if tile.queries[0] < copies * latents]
    span = Span(
        positions=Extent.of(clean + copies * latents) * rows,
        pairs=Extent(clean_pairs + noised_pairs, sum(tile.pairs for tile in tiles)) * rows,
        outputs=Extent.of(copies * latents) * rows,
        output_pairs=Extent(noised_pairs, sum(tile.pairs for tile in noised_tiles)) * rows,
    )
    drawn = rows * copies * (latents // block_size if flow.timestep_per == "block" else 1)
    # Beside the times that are drawn there is that of clean positions, 0.
    distinct = Extent(drawn + 1, drawn + rows // config.trainer.micro_batch_size)
    return dit_pass(
        config.dit, span, distinct, backward, input_gradient=trains_vae and flow.grad_to_encoder
    )


def _vae_block(config: TextVAEConfig) -> Block:
    """TextVAEBlock."""
    dim = config.dim
    return Block(
        query=Linear(dim, dim),
        keys_values=Linear(dim, 2 * dim),
        out=Linear(dim, dim),
        mlp=(Linear(dim, config.ffn_dim), Linear(config.ffn_dim // 2, dim)),
        ends_with_product=not config.post_norm,
    )


def _vae_patch(config: TextVAEConfig) -> Linear:
    """The encoder's convolution over patches of tokens, per latent."""
    return Linear(config.patch_size * config.dim, config.dim)


def _vae_posterior(config: TextVAEConfig) -> Linear:
    """The encoder's last layer: mean and log-variance."""
    return Linear(config.dim, 2 * config.latent_dim)


def _vae_latents_in(config: TextVAEConfig) -> Linear:
    """The decoder's first layer."""
    return Linear(config.latent_dim, config.dim)


def _vae_unpatch(config: TextVAEConfig) -> Linear:
    """The decoder's layer from a latent to its tokens."""
    return Linear(config.dim, config.patch_size * config.dim)


def _vae_head(config: TextVAEConfig) -> Linear:
    """The decoder's vocabulary head, per token."""
    return Linear(config.dim, config.vocab_size)


def _dit_block(config: DiTConfig) -> Block:
    """DiTBlock without its adaLN layers."""
    dim, inner, hidden = (
        config.txt_dim,
        config.heads * config.head_dim,
        config.txt_dim * config.expand_ratio,
    )
    return Block(
        query=Linear(dim, inner),
        keys_values=Linear(dim, 2 * inner),
        out=Linear(inner, dim),
        mlp=(Linear(dim, hidden), Linear(hidden, dim)),
        ends_with_product=False,
    )


def _dit_modulation(config: DiTConfig) -> Linear:
    """A block's four adaLN layers as one, per time: shift and scale before attention and MLP, a
    gate after each.
    """
    return Linear(config.emb_dim, 6 * config.txt_dim)


def _dit_time_in(config: DiTConfig) -> Linear:
    """The time embedding's first layer, which reads no weights' results."""
    return Linear(TIME_CHANNELS, config.txt_dim)


def _dit_time(config: DiTConfig) -> tuple[Linear, ...]:
    """The other layers outside blocks that run once per time: the rest of the time embedding, the
    last norm's shift and scale.
    """
    dim, embedding = config.txt_dim, config.emb_dim
    return (Linear(dim, dim), Linear(dim, embedding), Linear(embedding, 2 * dim))


def _dit_latents_in(config: DiTConfig) -> Linear:
    """The DiT's first layer."""
    return Linear(config.txt_in_channels, config.txt_dim)


def _dit_velocity(config: DiTConfig) -> Linear:
    """The DiT's last layer."""
    return Linear(config.txt_dim, config.txt_out_channels)

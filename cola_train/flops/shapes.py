"""The layers of each network, from its config alone: what parameters.py counts and networks.py runs."""

import dataclasses

from cola_train.config.baselines import TransformerConfig
from cola_train.config.models import DiTConfig, TextVAEConfig
from cola_train.flops.work import Linear

# Sine and cosine of 128 frequencies: what the DiT's time embedding reads (models/dit.py).
TIME_CHANNELS = 256


@dataclasses.dataclass(frozen=True)
class Block:
    """A transformer block.

    Attributes:
        query, keys_values, out: the attention's projections.
        mlp: the feed-forward's, in order.
        norms: parameters of its norms.
        ends_with_product: whether the block adds the last projection's output to its input as it is. No gradient needs that output,
            so recomputing the block stops short of it.
    """

    query: Linear
    keys_values: Linear
    out: Linear
    mlp: tuple[Linear, ...]
    norms: int
    ends_with_product: bool

    @property
    def linears(self) -> tuple[Linear, ...]:
        """All projections."""
        return (self.query, self.keys_values, self.out, *self.mlp)


def vae_block(config: TextVAEConfig) -> Block:
    """TextVAEBlock."""
    dim = config.dim
    affine_norms = 1 + config.layer_norm_affine + 2 * (config.qk_norm and config.qk_norm_affine)
    return Block(
        query=Linear(dim, dim, config.qk_bias),
        keys_values=Linear(dim, 2 * dim, config.qk_bias),
        out=Linear(dim, dim, config.bias),
        mlp=(Linear(dim, config.ffn_dim, config.bias), Linear(config.ffn_dim // 2, dim, config.bias)),
        norms=2 * dim * affine_norms,
        ends_with_product=not config.post_norm,
    )


def vae_patch(config: TextVAEConfig) -> Linear:
    """The encoder's convolution over patches of tokens, per latent."""
    return Linear(config.patch_size * config.dim, config.dim, True)


def vae_posterior(config: TextVAEConfig) -> Linear:
    """The encoder's last layer: mean and log-variance."""
    return Linear(config.dim, 2 * config.latent_dim, config.bias)


def vae_latents_in(config: TextVAEConfig) -> Linear:
    """The decoder's first layer."""
    return Linear(config.latent_dim, config.dim, config.bias)


def vae_unpatch(config: TextVAEConfig) -> Linear:
    """The decoder's layer from a latent to its tokens."""
    return Linear(config.dim, config.patch_size * config.dim, True)


def vae_head(config: TextVAEConfig) -> Linear:
    """The decoder's vocabulary head, per token."""
    return Linear(config.dim, config.vocab_size, config.bias)


def dit_block(config: DiTConfig) -> Block:
    """DiTBlock without its adaLN layers."""
    dim, inner, hidden = config.txt_dim, config.heads * config.head_dim, config.txt_dim * config.expand_ratio
    return Block(
        query=Linear(dim, inner, config.qk_bias),
        keys_values=Linear(dim, 2 * inner, config.qk_bias),
        out=Linear(inner, dim, config.qk_bias),
        mlp=(Linear(dim, hidden, True), Linear(hidden, dim, True)),
        norms=2 * 2 * config.head_dim,
        ends_with_product=False,
    )


def dit_modulation(config: DiTConfig) -> Linear:
    """A block's four adaLN layers as one, per time: shift and scale before attention and MLP, a gate after each."""
    return Linear(config.emb_dim, 6 * config.txt_dim, True)


def dit_time_in(config: DiTConfig) -> Linear:
    """The time embedding's first layer, which reads no weights' results."""
    return Linear(TIME_CHANNELS, config.txt_dim, True)


def dit_time(config: DiTConfig) -> tuple[Linear, ...]:
    """The other layers outside blocks that run once per time: the rest of the time embedding, the last norm's shift and scale."""
    dim, embedding = config.txt_dim, config.emb_dim
    return (Linear(dim, dim, True), Linear(dim, embedding, True), Linear(embedding, 2 * dim, True))


def dit_latents_in(config: DiTConfig) -> Linear:
    """The DiT's first layer."""
    return Linear(config.txt_in_channels, config.txt_dim, True)


def dit_velocity(config: DiTConfig) -> Linear:
    """The DiT's last layer."""
    return Linear(config.txt_dim, config.txt_out_channels, True)


def transformer_block(config: TransformerConfig) -> Block:
    """TransformerBlock."""
    dim, inner, hidden = config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size
    return Block(
        query=Linear(dim, inner, False),
        keys_values=Linear(dim, 2 * inner, False),
        out=Linear(inner, dim, False),
        mlp=(Linear(dim, 2 * hidden, False), Linear(hidden, dim, False)),
        norms=2 * dim,
        ends_with_product=True,
    )


def transformer_head(config: TransformerConfig) -> Linear:
    """The vocabulary head, per token."""
    return Linear(config.hidden_size, config.vocab_size, False)

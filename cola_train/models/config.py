"""The networks' configs: the fields of their config.json files, refused by name if unsupported."""

import dataclasses
from typing import Any, Literal

from cola_train.config.settings import (
    ANY_NUMBER,
    Rule,
    above_0,
    at_least,
    require,
    setting,
)
from cola_train.models.network_config import NetworkConfig

_NOT_0 = Rule("a finite number other than 0", lambda value: value != 0 and ANY_NUMBER.holds(value))


@dataclasses.dataclass(frozen=True)
class TextVAEConfig(NetworkConfig):
    """The Text VAE, fields and defaults of the released `cola_vae/config.json`."""

    vocab_size: int = setting(
        100278,
        help="Number of token ids; the encoder adds one row for [mask].",
        common=True,
        rule=at_least(1),
    )
    encoder_num_blocks: int = setting(
        4, help="Transformer blocks of the encoder.", rule=at_least(1)
    )
    decoder_num_blocks: int = setting(
        4, help="Transformer blocks of the decoder.", rule=at_least(1)
    )
    dim: int = setting(1536, help="Width.", rule=at_least(1))
    ffn_dim: int = setting(
        6144, help="Rows of ffn_proj: twice the hidden width, gate and value.", rule=at_least(1)
    )
    latent_dim: int = setting(16, help="Channels d of a latent.", rule=at_least(1))
    patch_size: int = setting(1, help="Tokens per latent.", rule=at_least(1))
    num_heads: int = setting(12, help="Attention heads.", rule=at_least(1))
    shared_heads_kv: int = setting(
        1, help="Query heads per key head; only 1 runs as released.", rule=at_least(1)
    )
    encoder_last_ln: bool = setting(True, help="LayerNorm without affine on the posterior mean.")
    layer_norm_type: str = setting("layer_norm", help="Only 'layer_norm'.")
    layer_norm_eps: float = setting(
        1e-6, help="Epsilon of all norms, the posterior mean's too.", rule=above_0()
    )
    layer_norm_affine: bool = setting(True, help="Weight and bias in norm_attn; norm_ffn has them.")
    post_norm: bool = setting(True, help="The released residual arrangement; false is pre-norm.")
    qk_bias: bool = setting(False, help="Bias in the q, k, v projection.")
    qk_norm: bool = setting(True, help="LayerNorm on q and k over the whole width.")
    qk_norm_affine: bool = setting(True, help="Weight and bias in that norm.")
    clip_qkv: float | None = setting(
        None, help="Clamp q, k, v to [-this, this]; null is off.", rule=above_0()
    )
    rope_theta: int = setting(500000, help="Base of the rotary frequencies.", rule=at_least(1))
    rope_full_precision: bool = setting(True, help="Rotary embedding in fp32; only true.")
    bias: bool = setting(True, help="Bias in output, feed-forward, final and in layers.")
    dropout: float = setting(0.0, help="Kept for the format; only 0.", rule=at_least(0))
    attn_dropout: float = setting(0.0, help="Kept for the format; only 0.", rule=at_least(0))
    act: str = setting("swiglu", help="Only 'swiglu'.")
    causal: bool = setting(False, help="Ignored by the released code; block_causal decides.")
    block_causal: bool = setting(True, help="Attention by blocks of block_size; only true.")
    block_size: int = setting(
        4,
        help="Latents per attention block of the VAE; 1 is strictly causal, as in the paper.",
        rule=at_least(1),
    )
    init_fn: str = setting("normal", help="Only 'normal' (truncated).")
    init_std: float = setting(0.02, help="Standard deviation of initial weights.", rule=above_0())
    init_cutoff_factor: int = setting(
        3, help="Initial weights are cut at this many deviations.", rule=at_least(1)
    )
    use_variation: bool = setting(True, help="Predict a variance beside the mean; only true.")
    use_emb: bool = setting(True, help="Read and ignored by the released code.")
    scaling_factor: float = setting(
        1.0, help="The DiT reads (z - shifting_factor) * this.", rule=_NOT_0
    )
    shifting_factor: float = setting(0.0, help="See scaling_factor.", rule=ANY_NUMBER)

    @property
    def num_blocks(self) -> int:
        return self.encoder_num_blocks + self.decoder_num_blocks

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.dim % (2 * self.num_heads) == 0,
            f"TextVAEConfig.dim ({self.dim}) must be a multiple of 2 x num_heads "
            f"({self.num_heads}) for RoPE.",
        )
        odd = f"TextVAEConfig.ffn_dim must be even (gate and value), not {self.ffn_dim}."
        require(self.ffn_dim % 2 == 0, odd)
        self._supports("shared_heads_kv", 1, "the released code cannot run grouped keys")
        self._supports("encoder_last_ln", True, "the method needs E[mu^2] = 1 per position")
        self._supports("layer_norm_type", "layer_norm", "no other norm was released")
        self._supports("rope_full_precision", True, "rotary angles are always fp32 here")
        for name in ("dropout", "attn_dropout"):
            why = "its draws would not be a function of (seed, sample, purpose)"
            self._supports(name, 0.0, why)
        self._supports("act", "swiglu", "no other activation was released")
        self._supports("block_causal", True, "without it the released code attends across samples")
        self._supports("init_fn", "normal", "no other initialization was released")
        self._supports("use_variation", True, "the posterior needs a variance")


@dataclasses.dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """The block-causal DiT, fields and defaults of the released `cola_dit/config.json`."""

    txt_in_channels: int = setting(
        16, help="Latent channels read; the VAE's latent_dim.", rule=at_least(1)
    )
    txt_out_channels: int = setting(
        16, help="Latent channels predicted; the VAE's latent_dim.", rule=at_least(1)
    )
    txt_dim: int = setting(2048, help="Width.", rule=at_least(1))
    emb_dim: int = setting(
        2048, help="Width of the time embedding; must equal txt_dim.", rule=at_least(1)
    )
    heads: int = setting(16, help="Attention heads.", rule=at_least(1))
    head_dim: int = setting(128, help="Channels per head.", rule=at_least(1))
    expand_ratio: int = setting(4, help="Hidden width of the MLP over txt_dim.", rule=at_least(1))
    num_layers: int = setting(24, help="Transformer blocks.", rule=at_least(1))
    norm_eps: float = setting(1e-5, help="Epsilon of every norm.", rule=above_0())
    qk_bias: bool = setting(False, help="Bias in the attention's two projections.")
    patch_size: int = setting(
        1, help="Only 1: the released code crashes on others.", rule=at_least(1)
    )
    rope_dim: int = setting(96, help="Channels of each head that rotate.", rule=at_least(2))
    block_size: int = setting(
        4, help="Latents per block (16 in the headline run).", rule=at_least(1)
    )

    head: Literal["velocity", "codebook"] = setting(
        "velocity",
        help="What the last layer gives: the velocity, as released, or a posterior over the codes "
        "of tokens, from which the velocity follows and which learns by cross-entropy.",
    )
    vocab_size: int | None = setting(
        None, help="Codes of head=codebook: the VAE's vocab_size; null for none.", rule=at_least(1)
    )
    embeds_codes: bool = setting(
        False,
        help="With head=codebook: clean latents are also read by an embedding of their token.",
    )

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def to_json(self) -> dict[str, Any]:
        """The fields as config.json carries them; those of a codebook where there is one."""
        fields = super().to_json()
        if self.head == "velocity":
            del fields["head"], fields["vocab_size"], fields["embeds_codes"]
        return fields

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.rope_dim % 2 == 0 and self.rope_dim <= self.head_dim,
            f"DiTConfig.rope_dim must be even and in 2..head_dim ({self.head_dim}), not "
            f"{self.rope_dim}.",
        )
        has_codes = self.vocab_size is not None
        require(
            has_codes == (self.head == "codebook"),
            f"DiTConfig.vocab_size ({self.vocab_size}) is the number of codes of head=codebook; "
            f"with head={self.head} it must be {'null' if has_codes else 'vae.vocab_size'}.",
        )
        if not has_codes:
            self._supports("embeds_codes", False, "head=velocity knows no codes")
        self._supports("patch_size", 1, "the released code crashes on other patch sizes")
        self._supports("emb_dim", self.txt_dim, "the released blocks need emb_dim equal to txt_dim")
        shape = "a velocity has the latent's shape, txt_in_channels"
        self._supports("txt_out_channels", self.txt_in_channels, shape)


@dataclasses.dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """A LLaMA transformer, fields of Hugging Face: RMSNorm, RoPE, SwiGLU, untied, no biases."""

    vocab_size: int = setting(
        100278,
        help="Number of token ids; LLaDA's input embedding adds one row for [mask].",
        common=True,
        rule=at_least(1),
    )
    hidden_size: int = setting(2048, help="Width.", rule=at_least(1))
    intermediate_size: int = setting(
        8192, help="Hidden width of the SwiGLU feed-forward.", rule=at_least(1)
    )
    num_hidden_layers: int = setting(27, help="Transformer blocks.", rule=at_least(1))
    num_attention_heads: int = setting(
        16, help="Attention heads; each has keys of its own.", rule=at_least(1)
    )
    head_dim: int = setting(128, help="Channels per head.", rule=at_least(1))
    rms_norm_eps: float = setting(
        1e-5, help="Epsilon of every norm; not in the paper.", rule=above_0()
    )
    rope_theta: float = setting(
        10000.0, help="Base of the rotary frequencies; not in the paper.", rule=above_0()
    )
    initializer_range: float = setting(
        0.02, help="Deviation of initial weights; not in the paper.", rule=above_0()
    )

    @property
    def num_blocks(self) -> int:
        return self.num_hidden_layers

    def __post_init__(self) -> None:
        super().__post_init__()
        odd = f"TransformerConfig.head_dim must be even for RoPE, not {self.head_dim}."
        require(self.head_dim % 2 == 0, odd)
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"TransformerConfig.hidden_size ({self.hidden_size}) must be a multiple of "
            f"num_attention_heads ({self.num_attention_heads}): Hugging Face's Llama needs it.",
        )


def check_pair(vae: TextVAEConfig, dit: DiTConfig) -> None:
    """Refuse a VAE and a DiT that cannot work together."""
    channels, latent_dim = dit.txt_in_channels, vae.latent_dim
    unequal = f"dit.txt_in_channels ({channels}) must equal vae.latent_dim ({latent_dim})."
    require(channels == latent_dim, unequal)
    require(
        dit.block_size % vae.block_size == 0,
        f"vae.block_size ({vae.block_size}) must divide dit.block_size ({dit.block_size}): "
        "a generated block is decoded as soon as it is complete.",
    )
    if dit.head == "codebook":
        require(
            dit.vocab_size == vae.vocab_size,
            f"dit.vocab_size ({dit.vocab_size}) must equal vae.vocab_size ({vae.vocab_size}): a "
            "codebook has a code for each token id.",
        )
        require(
            vae.patch_size == 1,
            f"dit.head=codebook needs vae.patch_size=1, not {vae.patch_size}: a code is of one "
            "token.",
        )


def check_seq_len(seq_len: int, patch_size: int, block_size: int) -> None:
    """Refuse rows that do not fill whole blocks of latents."""
    multiple = patch_size * block_size
    lower = seq_len // multiple * multiple
    allowed = f"{lower} or {lower + multiple}" if lower else f"{multiple}"
    require(
        seq_len > 0 and seq_len % multiple == 0,
        f"data.seq_len ({seq_len}) must be a multiple of patch_size x block_size ({patch_size} x "
        f"{block_size} = {multiple}); the nearest allowed: {allowed}. Prepare the data with that "
        "seq_len too.",
    )

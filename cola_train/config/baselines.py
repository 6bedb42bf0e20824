"""Settings of the two baselines, an autoregressive and a masked diffusion (LLaDA) language model (method, section 8, Table 9)."""

import dataclasses

from cola_train.config.models import NetworkConfig
from cola_train.config.settings import require, setting


@dataclasses.dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """A LLaMA transformer: RMSNorm, rotary embedding, SwiGLU, untied embeddings, no biases. Fields are Hugging Face's."""

    vocab_size: int = setting(100278, help="Number of token ids; LLaDA's input embedding adds one row for [mask].", common=True)
    hidden_size: int = setting(2048, help="Width.")
    intermediate_size: int = setting(8192, help="Hidden width of the SwiGLU feed-forward.")
    num_hidden_layers: int = setting(27, help="Transformer blocks.")
    num_attention_heads: int = setting(16, help="Attention heads; each has keys of its own.")
    head_dim: int = setting(128, help="Channels per head.")
    rms_norm_eps: float = setting(1e-5, help="Epsilon of every norm; not stated in the paper.")
    rope_theta: float = setting(10000.0, help="Base of the rotary frequencies; not stated in the paper.")
    initializer_range: float = setting(0.02, help="Standard deviation of initial weights; not stated in the paper.")

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"):
            value = getattr(self, name)
            require(value >= 1, f"TransformerConfig.{name} must be at least 1, not {value}.")
        require(self.head_dim % 2 == 0, f"TransformerConfig.head_dim must be even for RoPE, not {self.head_dim}.")
        require(self.hidden_size % self.num_attention_heads == 0,
                f"TransformerConfig.hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): Hugging Face's Llama needs it.")  # fmt: skip
        for name in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            require(value > 0, f"TransformerConfig.{name} must be above 0, not {value}.")


@dataclasses.dataclass(frozen=True)
class AutoregressiveConfig:
    """Next-token prediction."""

    mask_documents: bool = setting(False, help="Keep documents of a packed row apart; not stated in the paper.")


@dataclasses.dataclass(frozen=True)
class MaskedDiffusionConfig:
    """LLaDA: each token is masked with probability t, and the cross-entropy at masked tokens weighs 1/t."""

    min_mask_prob: float = setting(
        1e-3, help="t is uniform in (min_mask_prob, 1], which bounds the weight 1/t; not stated in the paper."
    )
    mask_documents: bool = setting(False, help="Keep documents of a packed row apart; not stated in the paper.")

    def __post_init__(self) -> None:
        require(0 < self.min_mask_prob < 1, f"objective.min_mask_prob must be in (0, 1), not {self.min_mask_prob}.")

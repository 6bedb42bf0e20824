"""Settings of the sampler (method, section 6)."""

import dataclasses

from cola_train.config.settings import require, setting


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How text is generated. Temperature 0 is greedy; top_k, top_p and seed of tokens then play no part."""

    num_steps: int = setting(16, help="Euler steps from noise to data, per block.")
    guidance_scale: float = setting(7.0, help="Classifier-free guidance g; 1 is off.")
    max_new_tokens: int = setting(32, help="Tokens to generate, at most.")
    temperature: float = setting(0.0, help="Softmax temperature of token choice; 0 takes the likeliest.")
    top_k: int = setting(50, help="Choose among this many likeliest tokens; 0 is off.")
    top_p: float = setting(0.9, help="Choose among the likeliest tokens whose probabilities reach this; 1 is off.")
    repetition_penalty: float = setting(
        1.1, help="Divides positive and multiplies negative logits of earlier blocks' ids; 1 is off."
    )
    eos_token_ids: tuple[int, ...] | None = setting(None, help="Ids that end the text; null takes the tokenizer's eos and im_end.")
    pad_token_id: int | None = setting(None, help="Id that fills the prompt's last block; null takes the tokenizer's.")
    seed: int = setting(0, help="Seed of the initial noise and of token draws.")
    batch_size: int = setting(32, help="Prompts that are generated together.")
    released_rounding: bool = setting(
        False, help="Round times and latents to bf16 on their way into the DiT, as the released code does."
    )

    def __post_init__(self) -> None:
        for name in ("num_steps", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} must be at least 1, not {value}.")
        require(self.temperature >= 0, f"temperature must be 0 (greedy) or more, not {self.temperature}.")
        require(self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}.")
        require(0 < self.top_p <= 1, f"top_p must be in (0, 1], not {self.top_p}.")
        require(self.repetition_penalty > 0, f"repetition_penalty must be above 0, not {self.repetition_penalty}.")

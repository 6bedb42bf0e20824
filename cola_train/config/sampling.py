"""Settings of the sampler (method, section 6)."""

import dataclasses
from typing import Literal

from cola_train.config.settings import (
    ANY_NUMBER,
    SEED,
    SHARE,
    SHARE_ABOVE_0,
    Rule,
    Settings,
    above_0,
    at_least,
    setting,
)

Solver = Literal["euler", "heun", "adams2", "adams3"]
History = Literal["generated", "reencoded"]
_TIMES = Rule(
    "two times in [0, 1], the lower first",
    lambda times: len(times) == 2 and 0 <= times[0] <= times[1] <= 1,
)
# More has no use, and overflows.
_NOISE_SCALE = Rule("in [0, 100]", lambda scale: 0 <= scale <= 100)
_IDS = Rule("ids of at least 0", lambda ids: all(token >= 0 for token in ids))


@dataclasses.dataclass(frozen=True)
class SamplerConfig(Settings):
    """How text is generated. Temperature 0 is greedy: top_k, top_p and seed then play no part."""

    num_steps: int = setting(
        16, help="Solver steps from noise to data, per block.", common=True, rule=at_least(1)
    )
    guidance_scale: float = setting(
        7.0, help="Classifier-free guidance g; 1 is off.", common=True, rule=ANY_NUMBER
    )
    max_new_tokens: int = setting(
        32, help="Tokens to generate, at most.", common=True, rule=at_least(1)
    )
    temperature: float = setting(
        0.0,
        help="Softmax temperature of token choice; 0 takes the likeliest.",
        common=True,
        rule=at_least(0),
    )
    top_k: int = setting(
        50, help="Choose among this many likeliest tokens; 0 is off.", rule=at_least(0)
    )
    top_p: float = setting(
        0.9,
        help="Choose among the likeliest tokens whose probabilities reach this; 1 is off.",
        common=True,
        rule=SHARE_ABOVE_0,
    )
    repetition_penalty: float = setting(
        1.1,
        help="Divides positive and multiplies negative logits of earlier blocks' ids; 1 is off.",
        common=True,
        rule=above_0(),
    )
    eos_token_ids: tuple[int, ...] | None = setting(
        None, help="Ids that end the text; null takes the tokenizer's eos and im_end.", rule=_IDS
    )
    pad_token_id: int | None = setting(
        None,
        help="Id that fills the prompt's last block; null takes the tokenizer's.",
        rule=at_least(0),
    )
    seed: int = setting(
        0, help="Seed of the initial noise and of token draws.", common=True, rule=SEED
    )
    batch_size: int = setting(
        32,
        help="Prompts that are generated together; one that ends makes room for the next.",
        rule=at_least(1),
    )
    released_rounding: bool = setting(
        False,
        help="Round times and latents to bf16 on their way into the DiT, and in bf16 adaLN's "
        "1 + scale, as the released code does.",
    )
    solver: Solver = setting(
        "euler",
        help="Of the flow's ODE: euler (order 1), heun (order 2, two network calls a step but for "
        "the last), adams2 or adams3 (Adams-Bashforth of order 2 or 3, one call a step; "
        "adams3 one more in all).",
        common=True,
    )
    guidance_interval: tuple[float, float] = setting(
        (0.0, 1.0),
        help="Least and greatest time t at which guidance applies; outside, the conditional branch "
        "runs alone.",
        rule=_TIMES,
    )
    guidance_rescale: float = setting(
        0.0,
        help="Share by which a guided velocity is scaled back to the conditional one's standard "
        "deviation; 0 is off.",
        rule=SHARE,
    )
    noise_scale: float = setting(
        1.0,
        help="Factor of the initial noise, a temperature: below 1 texts are likelier and less "
        "various (Cola DLM alone).",
        rule=_NOISE_SCALE,
    )
    history: History = setting(
        "generated",
        help="What later blocks see of a finished one: its generated latents, or its tokens "
        "encoded anew, as a prompt's are (Cola DLM alone).",
    )
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto",
        help="Of the networks' passes; weights stay fp32. auto is bf16 on a GPU and fp32 "
        "elsewhere.",
    )
    compile: bool = setting(
        False,
        help="Compile the DiT's denoising pass, with shapes that stay the same from block to block "
        "(Cola DLM alone).",
    )

    def guides_at(self, t: float) -> bool:
        """Whether guidance changes the velocity at time t of a block that has history."""
        low, high = self.guidance_interval
        # The times of solvers.time_grid are rounded: 1 - 9/10 is a little less than 0.1.
        return self.guidance_scale != 1 and low - 1e-9 <= t <= high + 1e-9

"""Settings of what judges the writing of all families alike: compare and verify."""

import dataclasses

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import (
    BETWEEN_0_AND_1,
    Settings,
    at_least,
    require,
    section,
    setting,
)

FEWEST_OPENINGS = 4  # two in each half
_OWN_DISTRIBUTION = SamplerConfig(
    temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, guidance_scale=1.0
)


@dataclasses.dataclass(frozen=True)
class ComparisonConfig(Settings):
    """`cola-train compare`: continuations of held-out openings."""

    num_openings: int = setting(
        256,
        help="Held-out openings to continue, at most.",
        common=True,
        rule=at_least(FEWEST_OPENINGS, " for a standard error"),
    )
    num_new_tokens: int = setting(
        32, help="Tokens to generate after each.", common=True, rule=at_least(1)
    )
    num_bytes: int = setting(
        80,
        help="Bytes of each continuation that the byte judge reads, at most; num_new_tokens should "
        "give as many.",
        rule=at_least(1),
    )
    brier_places: int = setting(
        2,
        help="Places in each of num_openings held-out rows where two samples of 4 tokens are "
        "written for BrierLM; 0 leaves it out.",
        rule=at_least(0),
    )
    judge_order: int = setting(
        4,
        help="Longest n-gram of the judge of tokens, which is trained on the training rows.",
        rule=at_least(1),
    )
    judge: str | None = setting(
        None,
        help="A checkpoint of an autoregressive model that judges, too, what is written; it must "
        "have been trained on other text (docs/scaling.md).",
        common=True,
    )
    greedy: SamplerConfig = section(
        SamplerConfig,
        help="How next words are taken; must be greedy (temperature 0).",
        common=False,
    )
    sampler: SamplerConfig = setting(
        _OWN_DISTRIBUTION,
        help="How the text is written that is judged; by default the model's own distribution, "
        "nothing cut or guided.",
        common=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.greedy.temperature == 0,
            f"comparison.greedy.temperature must be 0, not {self.greedy.temperature}.",
        )


@dataclasses.dataclass(frozen=True)
class VerificationConfig(Settings):
    """`cola-train verify`: texts of a generated language, from nothing and as completions."""

    num_texts: int = setting(
        400,
        help="Texts from nothing, and held-out documents to complete the beginning of, at most.",
        common=True,
        rule=at_least(1),
    )
    prompt_share: float = setting(
        0.5,
        help="Share of a document's tokens that are its prompt, rounded down, but at least one.",
        common=True,
        rule=BETWEEN_0_AND_1,
    )
    sampler: SamplerConfig = setting(
        _OWN_DISTRIBUTION,
        help="How texts are written, by default from the model's own distribution; max_new_tokens "
        "and eos_token_ids play no part: a text may fill its row, and ends as documents do.",
        common=True,
    )

"""Settings of likelihood (method, section 7)."""

import dataclasses
from typing import Literal

from cola_train.config.settings import SEED, Rule, at_least, require_each, setting

MOST_SAMPLES = 4096  # draws of one row that have addresses of their own


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
    """`cola-train likelihood`: how log p(x) is found. AR models use batch_size and num_rows."""

    num_samples: int = setting(4, help="K: draws of the latents (LLaDA: of the mask) for each row.")
    solver: Literal["euler", "trapezoid", "dopri5"] = setting(
        "trapezoid",
        help="Of the prior's ODE: euler (order 1), trapezoid (the explicit trapezoidal rule, order "
        "2) or dopri5 (order 5, with steps of its own choice).",
    )
    num_steps: int = setting(16, help="Steps of euler (one DiT pass each) and trapezoid (two).")
    rtol: float = setting(1e-3, help="dopri5: allowed error of a step, relative to the state.")
    atol: float = setting(1e-3, help="dopri5: error of a step that is allowed besides, absolute.")
    divergence: Literal["hutchinson", "exact"] = setting(
        "hutchinson",
        help="Of the velocity: by one random probe a draw, or exact, which costs block_size x "
        "channels as many backward passes.",
    )
    batch_size: int = setting(32, help="Draws of rows that are computed together.")
    num_rows: int | None = setting(32, help="Held-out rows, from the first one; null takes all.")
    seed: int = setting(0, help="Seed of latents, probes and masks.")

    def __post_init__(self) -> None:
        draws = Rule(f"in 1..{MOST_SAMPLES}", lambda number: 1 <= number <= MOST_SAMPLES)
        require_each(self, "", draws, "num_samples")
        require_each(self, "", at_least(1), "num_steps", "batch_size")
        require_each(self, "", Rule("in (0, 1)", lambda error: 0 < error < 1), "rtol", "atol")
        require_each(self, "", at_least(1, ", or null"), "num_rows")
        require_each(self, "", SEED, "seed")

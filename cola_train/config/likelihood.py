"""Settings of likelihood (method, section 7)."""

import dataclasses
from typing import Literal

from cola_train.config.settings import require, setting

MOST_SAMPLES = 4096  # draws of one row that have addresses of their own


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig:
    """`cola-train likelihood`: how log p(x) is found. For an autoregressive model, batch_size and
    num_rows alone matter.
    """

    num_samples: int = setting(4, help="K: draws of the latents (LLaDA: of the mask) for each row.")
    solver: Literal["euler", "trapezoid", "dopri5"] = setting(
        "trapezoid",
        help=(
            "Of the prior's ODE: euler (order 1), trapezoid (the explicit trapezoidal rule, order "
            "2) or dopri5 (order 5, with steps of its own choice)."
        ),
    )
    num_steps: int = setting(
        16, help="Steps of euler (one pass of the DiT each) and trapezoid (two)."
    )
    rtol: float = setting(
        1e-3, help="dopri5: error of a step that is allowed, relative to the state."
    )
    atol: float = setting(1e-3, help="dopri5: error of a step that is allowed besides, absolute.")
    divergence: Literal["hutchinson", "exact"] = setting(
        "hutchinson",
        help=(
            "Of the velocity: by one random probe a draw, or exact, which costs block_size x "
            "channels as many backward passes."
        ),
    )
    batch_size: int = setting(32, help="Draws of rows that are computed together.")
    num_rows: int | None = setting(32, help="Held-out rows, from the first one; null takes all.")
    seed: int = setting(0, help="Seed of latents, probes and masks.")

    def __post_init__(self) -> None:
        require(
            1 <= self.num_samples <= MOST_SAMPLES,
            f"num_samples must be in 1..{MOST_SAMPLES}, not {self.num_samples}.",
        )
        for name in ("num_steps", "batch_size"):
            require(
                getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}."
            )
        for name in ("rtol", "atol"):
            require(
                0 < getattr(self, name) < 1,
                f"{name} must be in (0, 1), not {getattr(self, name)}.",
            )
        require(
            self.num_rows is None or self.num_rows >= 1,
            f"num_rows must be at least 1, or null, not {self.num_rows}.",
        )
        require(0 <= self.seed < 2**63, f"seed must be in [0, 2^63), not {self.seed}.")

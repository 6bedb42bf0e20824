"""Settings of optimization: the optimizer and the learning rate."""

import dataclasses
from typing import Literal

from cola_train.config.amounts import Amount
from cola_train.config.settings import (
    SHARE_BELOW_1,
    Rule,
    Settings,
    above_0,
    at_least,
    require,
    setting,
)


@dataclasses.dataclass(frozen=True)
class OptimConfig(Settings):
    """AdamW, and the paper's schedule: linear warm-up, then cosine (Tables 8 and 10)."""

    optimizer: Literal["adamw", "muon"] = setting(
        "adamw",
        help="adamw for every parameter; or muon for the matrices of the blocks, but for adaLN's, "
        "and AdamW for all else. One learning rate and weight decay serve both.",
    )
    learning_rate: float = setting(
        1.5e-4, help="Peak learning rate, reached when warm-up ends.", common=True, rule=above_0()
    )
    start_learning_rate: float = setting(1e-6, help="Learning rate of step 0.", rule=at_least(0))
    final_learning_rate: float = setting(
        1e-5, help="Learning rate from the end of decay on.", rule=at_least(0)
    )
    schedule: Literal["cosine", "wsd"] = setting(
        "cosine",
        help="After warm-up a cosine to the end of decay; or wsd, warmup-stable-decay: the peak "
        "rate, then a linear anneal.",
    )
    warmup: str = setting(
        "5000",
        help="How long the linear warm-up takes: '5000 steps', '3.6e9 tokens', '38.9 EFLOPs'.",
        common=True,
    )
    decay: str = setting(
        "1000000",
        help="Where the final learning rate is reached, from the run's start; an amount like "
        "warmup.",
        common=True,
    )
    anneal: str = setting(
        "0", help="wsd: how long the anneal before the end of decay takes; an amount like warmup."
    )
    beta1: float = setting(0.9, help="AdamW's first moment decay.", rule=SHARE_BELOW_1)
    beta2: float = setting(0.95, help="AdamW's second moment decay.", rule=SHARE_BELOW_1)
    eps: float = setting(1e-8, help="AdamW's epsilon; not stated in the paper.", rule=above_0())
    weight_decay: float = setting(
        0.01,
        help="Decoupled weight decay of every parameter, times the learning rate.",
        rule=at_least(0),
    )
    muon_momentum: float = setting(
        0.95,
        help="Muon's moving average of the gradient: the share kept at each step.",
        rule=SHARE_BELOW_1,
    )
    muon_nesterov: bool = setting(
        True, help="Muon moves by the average with the newest gradient counted once more."
    )
    muon_iterations: int = setting(
        5,
        help="Newton-Schulz iterations by which Muon makes a matrix's update orthogonal.",
        rule=Rule("in [1, 99]", lambda number: 1 <= number < 100),
    )
    gradient_clip: float = setting(1.0, help="Largest global norm of the gradient.", rule=above_0())

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("warmup", "decay", "anneal"):
            Amount.parse(getattr(self, name), f"optim.{name}")
        rate, decay = self.learning_rate, self.weight_decay
        require(
            rate * decay <= 1,
            f"optim.weight_decay ({decay}) x optim.learning_rate ({rate}) must be at most 1, the "
            "share of a weight that a step takes away.",
        )
        anneals = Amount.parse(self.anneal, "optim.anneal").count > 0
        require(
            anneals == (self.schedule == "wsd"),
            "optim.anneal is the last part of optim.schedule=wsd and needs it, as it needs an "
            f"anneal above 0; got schedule={self.schedule}, anneal={self.anneal!r}.",
        )

    def check_horizons(self, warmup: int, decay: int, anneal: int) -> None:
        """Refuse horizons, converted to steps, that do not fit together."""
        begins = f", and before the anneal ({self.anneal!r}, {anneal} steps) begins"
        require(
            warmup < decay and warmup + anneal <= decay,
            f"optim.warmup ({self.warmup!r}, {warmup} steps) must end before optim.decay "
            f"({self.decay!r}, {decay} steps){begins if anneal else ''}.",
        )

"""The learning rate, as a pure function of the step."""

import dataclasses
import math

from cola_train.config.amounts import Amount
from cola_train.config.optim import OptimConfig
from cola_train.config.run import RunConfig
from cola_train.families.costs import steps_to


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, its horizons in steps."""

    config: OptimConfig
    warmup_steps: int
    decay_steps: int  # the final rate is reached after this many
    anneal_steps: int  # wsd: the last of them

    @classmethod
    def of(cls, config: RunConfig) -> "Schedule":
        """A run's, its horizons converted to steps; a UserError if these do not fit together."""
        optim = config.optim
        warmup, decay, anneal = (
            steps_to(config, Amount.parse(getattr(optim, name), f"optim.{name}"))
            for name in ("warmup", "decay", "anneal")
        )
        optim.check_horizons(warmup, decay, anneal)
        return cls(optim, warmup, decay, anneal)

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0.

        Linear warm-up, then a cosine to `decay_steps`, or (wsd) the peak rate and a straight line
        over the last `anneal_steps`; constant from there on.
        """
        config = self.config
        start, peak = config.start_learning_rate, config.learning_rate
        final, is_cosine = config.final_learning_rate, config.schedule == "cosine"
        if step < self.warmup_steps:
            return start + step / self.warmup_steps * (peak - start)
        begin = self.warmup_steps if is_cosine else self.decay_steps - self.anneal_steps
        done = min(1.0, max(0.0, (step - begin) / (self.decay_steps - begin)))
        left = 0.5 * (1 + math.cos(math.pi * done)) if is_cosine else 1 - done
        return final + left * (peak - final)

"""What a run has spent, where it ends, and which steps are marks: by the counters it saves."""

from cola_train.config.amounts import FLOPS_PER_EFLOP, Amount, Mark
from cola_train.config.loop import Convention
from cola_train.config.run import RunConfig
from cola_train.families.costs import phase_flops, phase_of, steps_to
from cola_train.training.loop.state import RunState


class Budget:
    """The arithmetic of `budget` and `trainer.max_steps`. Whole FLOPs, so that sums are exact."""

    def __init__(self, config: RunConfig) -> None:
        budget = config.budget
        self.config, self.convention = config, budget.convention
        self.max_steps = config.trainer.max_steps
        self._tokens_per_step = config.trainer.global_batch_size * config.data.seq_len
        self._costs: dict[str, dict[Convention, int]] = {}
        self.flops: int | None = None
        if budget.eflops is not None:
            self.flops = Amount.of_eflops(budget.eflops).count
        self.marks = [Mark.parse(text, "budget.marks") for text in budget.marks]

    def spend(self, state: RunState) -> None:
        """Count the next step of `state` as done."""
        for convention, flops in self._cost(state.step).items():
            state.flops[convention] = state.flops.get(convention, 0) + flops
        state.tokens += self._tokens_per_step
        state.step += 1

    def is_spent(self, state: RunState) -> bool:
        """Whether the run ends here: at its last step, or at the first that reached the budget."""
        spent = self.flops is not None and state.flops.get(self.convention, 0) >= self.flops
        return spent or state.step >= self.max_steps

    def at_mark(self, state: RunState) -> bool:
        """Whether the step that was just done reached a mark."""
        last_flops = self._cost(state.step - 1)[self.convention]
        flops = state.flops.get(self.convention, 0)
        ranges = {
            "steps": (state.step - 1, state.step),
            "tokens": (state.tokens - self._tokens_per_step, state.tokens),
            "EFLOPs": (flops - last_flops, flops),
        }
        return any(mark.passed(*ranges[mark.amount.unit]) for mark in self.marks)

    def _cost(self, step: int) -> dict[Convention, int]:
        phase = phase_of(self.config, step)
        if phase not in self._costs:
            self._costs[phase] = phase_flops(self.config, phase)
        return self._costs[phase]

    @property
    def last_step(self) -> int:
        """The step that the run will end with."""
        if self.flops is None:
            return self.max_steps
        return min(self.max_steps, steps_to(self.config, Amount(self.flops, "EFLOPs")))


def eflops(state: RunState) -> dict[str, float]:
    """What has been spent, by convention, in EFLOPs."""
    return {name: flops / FLOPS_PER_EFLOP for name, flops in sorted(state.flops.items())}

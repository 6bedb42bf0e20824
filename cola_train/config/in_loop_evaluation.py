"""Settings of evaluation while a run trains."""

import dataclasses

from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.inspection import InspectionConfig
from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.settings import Rule, nearest, require, require_each, section, setting

EVALUATORS = ("inspection", "likelihood", "benchmarks")


@dataclasses.dataclass(frozen=True)
class InLoopEvalConfig:
    """What is measured while a run trains, on the weights that ema.evaluate chooses."""

    every_steps: int = setting(0, help="Optimizer steps between evaluations; 0 is never.")
    at_marks: bool = setting(False, help="Evaluate at budget.marks too.")
    evaluators: list[str] = setting(
        ["inspection"],
        help="Which: inspection (latents; not of baselines), likelihood and benchmarks (not in "
        "stage 1).",
    )
    tasks: list[str] = setting(["all"], help="Benchmarks to run, or all.")
    benchmark_data: str | None = setting(
        None, help="Folder of TASK.jsonl files (`cola-train evaluate --fetch`), for benchmarks."
    )
    inspection: InspectionConfig = section(InspectionConfig, help="As of `cola-train inspect`.")
    likelihood: LikelihoodConfig = section(LikelihoodConfig, help="As of `cola-train likelihood`.")
    benchmarks: EvaluationConfig = section(EvaluationConfig, help="As of `cola-train evaluate`.")

    def __post_init__(self) -> None:
        rule = Rule("0 (never) or more", lambda steps: steps >= 0)
        require_each(self, "in_loop_eval.", rule, "every_steps")
        for name in self.evaluators:
            require(
                name in EVALUATORS,
                f"in_loop_eval.evaluators has an unknown entry '{name}'; "
                f"{nearest(name, EVALUATORS)}",
            )
        needs_data = self.is_on and "benchmarks" in self.evaluators
        require(
            not needs_data or self.benchmark_data is not None,
            "in_loop_eval.evaluators has benchmarks, which need in_loop_eval.benchmark_data: a "
            "folder of TASK.jsonl files, made by `cola-train evaluate --fetch`.",
        )

    @property
    def is_on(self) -> bool:
        """Whether anything is ever evaluated."""
        return self.every_steps > 0 or self.at_marks

    def check_family(self, possible: tuple[str, ...], stage: str) -> None:
        """Refuse evaluators that a stage has no use for.

        Raises:
            UserError: evaluation is on, with one that is not among `possible`.
        """
        for name in self.evaluators if self.is_on else []:
            require(
                name in possible,
                f"in_loop_eval.evaluators={self.evaluators}: {name} is not for a run of "
                f"`cola-train {stage}`; it can have {', '.join(possible)}.",
            )

"""Settings of evaluation: likelihood (method, section 7), benchmarks and the latent space."""

import dataclasses
from typing import Literal

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import (
    BETWEEN_0_AND_1,
    NOT_EMPTY,
    SEED,
    Rule,
    Settings,
    at_least,
    nearest,
    require,
    section,
    setting,
)

MOST_SAMPLES = 4096  # draws of one row that have addresses of their own
_DRAWS = Rule(f"in 1..{MOST_SAMPLES}", lambda number: 1 <= number <= MOST_SAMPLES)
# Of two rows each can be given the other's history.
_ROWS = at_least(2)
BENCHMARKS = ("lambada", "mmlu", "obqa", "hellaswag", "race", "siqa", "squad", "story_cloze")
EVALUATORS = ("inspection", "likelihood", "benchmarks")


@dataclasses.dataclass(frozen=True)
class LikelihoodConfig(Settings):
    """`cola-train likelihood`: how log p(x) is found. AR models use batch_size and num_rows."""

    method: Literal["bound", "ode"] = setting(
        "bound",
        help="Cola: bound (by denoising errors, whatever the network; one DiT pass a draw) or ode "
        "(an estimate, by the prior's ODE; all settings of solver and divergence are for it).",
        common=True,
    )
    num_samples: int = setting(
        64,
        help="K: draws of latents and noise levels (LLaDA: of the mask) for each row; ode takes "
        "some hundred times as long for each as bound.",
        rule=_DRAWS,
    )
    solver: Literal["euler", "trapezoid", "dopri5"] = setting(
        "trapezoid",
        help="Of the prior's ODE: euler (order 1), trapezoid (the explicit trapezoidal rule, order "
        "2) or dopri5 (order 5, with steps of its own choice).",
    )
    num_steps: int = setting(
        16, help="Steps of euler (one DiT pass each) and trapezoid (two).", rule=at_least(1)
    )
    rtol: float = setting(
        1e-3, help="dopri5: allowed error of a step, relative to latents.", rule=BETWEEN_0_AND_1
    )
    atol: float = setting(
        1e-3,
        help="dopri5: error of a step that is allowed besides, absolute; of log p in nats.",
        rule=BETWEEN_0_AND_1,
    )
    divergence: Literal["hutchinson", "exact"] = setting(
        "hutchinson",
        help="Of the velocity: by one random probe a draw, or exact, which costs block_size x "
        "channels as many backward passes.",
    )
    batch_size: int = setting(
        32, help="Draws of rows that are computed together.", rule=at_least(1)
    )
    num_rows: int | None = setting(
        32, help="Held-out rows, from the first one; null takes all.", rule=at_least(1)
    )
    seed: int = setting(0, help="Seed of latents, probes and masks.", rule=SEED)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Settings):
    """`cola-train evaluate`: how benchmarks are answered; by default by the released protocol."""

    sampler: SamplerConfig = section(
        SamplerConfig, help="How answers are generated; batch_size samples at a time."
    )
    num_samples: int | None = setting(
        None,
        help="Answer so many first samples of each benchmark; null is all.",
        common=True,
        rule=at_least(1),
    )
    choose_by: Literal["generation", "likelihood", "likelihood_per_token"] = setting(
        "generation",
        help="How a sample with options is answered: generation (the released protocol: text, "
        "which is scored), likelihood (the option that is likeliest after the prompt) or "
        "likelihood_per_token (the same, divided by the option's tokens).",
        common=True,
    )
    likelihood: LikelihoodConfig = section(
        LikelihoodConfig, help="How likelihoods are found, where options are chosen by them."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.choose_by == "generation" or self.likelihood.method == "bound",
            f"choose_by={self.choose_by} compares options of different length, and "
            f"likelihood.method={self.likelihood.method} also scores what fills up their last "
            "block: use likelihood.method=bound.",
        )


@dataclasses.dataclass(frozen=True)
class InspectionConfig(Settings):
    """`cola-train inspect`: what latents of held-out rows hold and what the prior knows of them."""

    num_rows: int = setting(
        256, help="Held-out rows to look at, from the first, at most.", rule=_ROWS
    )
    batch_size: int = setting(16, help="Rows at a time; memory grows with it.", rule=_ROWS)
    num_times: int = setting(
        11,
        help="Noise times, evenly from 0 to 1, at which noised latents are decoded.",
        rule=at_least(2),
    )
    num_time_bins: int = setting(
        10, help="Equal parts of [0, 1] by which the flow loss is given.", rule=at_least(1)
    )
    yardstick_rows: int | None = setting(
        8192,
        help="Training rows, evenly spread, whose tokens the n-gram yardsticks count; null is all. "
        "Codes are read off at most 1,024 of them.",
        rule=at_least(1),
    )
    elbo_draws: int = setting(
        2,
        help="Draws of latents and noise levels of each row for the bound in nats: a pass of the "
        "DiT and of both yardsticks each.",
        rule=_DRAWS,
    )
    num_steps: int = setting(
        16,
        help="Euler steps from noise to data when the prior is asked for a block (guidance 1).",
        rule=at_least(1),
    )
    map_latents: int = setting(
        2000, help="Latents on the 2-D map, from the first row on, at most.", rule=at_least(3)
    )
    seed: int = setting(
        0,
        help="Seed of posterior samples, noise and times: every look sees the same ones.",
        rule=SEED,
    )


@dataclasses.dataclass(frozen=True)
class InLoopEvalConfig(Settings):
    """What is measured while a run trains, on the weights that ema.evaluate chooses."""

    every_steps: int = setting(
        0, help="Optimizer steps between evaluations; 0 is never.", rule=at_least(0)
    )
    at_marks: bool = setting(False, help="Evaluate at budget.marks too.")
    evaluators: list[str] = setting(
        ["inspection"],
        help="Which: inspection (latents; not of baselines), likelihood and benchmarks (not in "
        "stage 1).",
        rule=NOT_EMPTY,
    )
    tasks: list[str] = setting(["all"], help="Benchmarks to run, or all.", rule=NOT_EMPTY)
    benchmark_data: str | None = setting(
        None, help="Folder of TASK.jsonl files (`cola-train evaluate --fetch`), for benchmarks."
    )
    inspection: InspectionConfig = section(InspectionConfig, help="As of `cola-train inspect`.")
    likelihood: LikelihoodConfig = section(LikelihoodConfig, help="As of `cola-train likelihood`.")
    benchmarks: EvaluationConfig = section(EvaluationConfig, help="As of `cola-train evaluate`.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.evaluators:
            require(
                name in EVALUATORS,
                f"in_loop_eval.evaluators has an unknown entry '{name}'; "
                f"{nearest(name, EVALUATORS)}",
            )
        for name in self.tasks if self.tasks != ["all"] else []:
            require(
                name in BENCHMARKS,
                f"There is no benchmark '{name}' (in_loop_eval.tasks); {nearest(name, BENCHMARKS)}",
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

"""Settings of evaluation: likelihood (method, section 7), benchmarks and the latent space."""

import dataclasses
from typing import Literal

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import (
    SEED,
    Rule,
    at_least,
    nearest,
    require,
    require_each,
    section,
    setting,
)

MOST_SAMPLES = 4096  # draws of one row that have addresses of their own
EVALUATORS = ("inspection", "likelihood", "benchmarks")


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


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """`cola-train evaluate`: how benchmarks are answered; by default by the released protocol."""

    sampler: SamplerConfig = section(
        SamplerConfig, help="How answers are generated; batch_size samples at a time."
    )
    num_samples: int | None = setting(
        None, help="Answer so many first samples of each benchmark; null is all.", common=True
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
        require_each(self, "", at_least(1, ", or null"), "num_samples")


@dataclasses.dataclass(frozen=True)
class InspectionConfig:
    """`cola-train inspect`: what latents of held-out rows hold and what the prior knows of them."""

    num_rows: int = setting(256, help="Held-out rows to look at, from the first, at most.")
    batch_size: int = setting(16, help="Rows at a time; memory grows with it.")
    num_times: int = setting(
        11, help="Noise times, evenly from 0 to 1, at which noised latents are decoded."
    )
    num_time_bins: int = setting(10, help="Equal parts of [0, 1] by which the flow loss is given.")
    num_steps: int = setting(
        16, help="Euler steps from noise to data when the prior is asked for a block (guidance 1)."
    )
    map_latents: int = setting(2000, help="Latents on the 2-D map, from the first row on, at most.")
    seed: int = setting(
        0, help="Seed of posterior samples, noise and times: every look sees the same ones."
    )

    def __post_init__(self) -> None:
        prefix = "inspection's "
        # Of two rows each can be given the other's history.
        require_each(self, prefix, at_least(2), "num_rows", "batch_size", "num_times")
        require_each(self, prefix, at_least(1), "num_time_bins", "num_steps")
        require_each(self, prefix, at_least(3), "map_latents")
        require_each(self, prefix, SEED, "seed")


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

"""Ladders of points that follow known laws."""

import math

import numpy as np

from cola_train.scaling.points import Point

SIZES = {"small": 100_000, "medium": 200_000, "large": 400_000, "huge": 800_000}
BUDGETS = (3e-6, 6e-6, 1.2e-5, 2.4e-5, 4.8e-5)
BEST_AT_FIRST = 2e5  # parameters
GROWTH = 0.4


def best_size(budget: float) -> float:
    return BEST_AT_FIRST * (budget / BUDGETS[0]) ** GROWTH


def ladder(
    budgets: tuple[float, ...] = BUDGETS, sizes: dict[str, int] = SIZES, noise: float = 0.0
) -> list[Point]:
    """Two families whose metrics are a power law of compute, worse by a parabola away from the best
    size.
    """
    generator = np.random.default_rng(3)
    points = []
    for family, kind, limit in (("cola", "anneal", 3.1), ("ar", "run", 2.9)):
        for budget in budgets:
            for size, parameters in sizes.items():
                away = math.log(parameters / best_size(budget)) ** 2
                law = (budget / budgets[0]) ** -0.3
                flops = round(budget * 1e18)
                metrics = {
                    "judge_nats_per_token": (
                        limit + 1.2 * law + 0.05 * away + noise * float(generator.normal())
                    ),
                    "judge_nats_per_token_standard_error": 0.02,
                    "held_out_judge_nats_per_token": 3.0,
                    "next_word_accuracy": (
                        0.5 - 0.3 * law - 0.02 * away + noise / 10 * float(generator.normal())
                    ),
                }
                counts = {"paper": 2 * flops, "model": flops, "executed": flops + parameters}
                points.append(
                    Point(
                        family, size, parameters, flops // parameters, budget, counts, kind, metrics
                    )
                )
    return points

"""How often the 95 % intervals of scaling fits hold the truth, on synthetic points of known laws.

`python -m tests.scaling.coverage --setting NAME --curves 200` prints the table of docs/scaling.md.
An interval that is not drawn does not count: "drawn" is of how many curves it was.
"""

import argparse
import collections
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cola_train.bootstrap import Interval
from cola_train.scaling.frontier import frontier
from cola_train.scaling.isoflop import Growth, fit_isoflop
from cola_train.scaling.points import Point
from cola_train.scaling.power_law import NotFitted, PowerLaw, fit_power_law
from cola_train.scaling.size_curve import fit_size_curve
from cola_train.scaling.surface import Surface, fit_surface

# Hoffmann et al. 2022: L(N, D) = E + A / N^alpha + B / D^beta.
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28
Found = Iterator[tuple[str, Interval | None, float]]  # what, its interval, the truth
Truth = Callable[[Any], Any]  # the best loss at some FLOPs


def loss(size: Any, flops: Any) -> Any:
    return E + A / size**ALPHA + B / (flops / (6 * size)) ** BETA


def best_size(flops: Any) -> Any:
    return (ALPHA * A / (BETA * B) * (flops / 6) ** BETA) ** (1 / (ALPHA + BETA))


def best_loss(flops: Any) -> Any:
    return loss(best_size(flops), flops)


def size_curve(
    draws: np.random.Generator, *, num_sizes: int, span: float, noise: float, off: float = 1.3
) -> Found:
    """One budget; the sizes lie around `off` times the best."""
    flops = 1e20
    sizes = off * best_size(flops) * np.geomspace(span**-0.5, span**0.5, num_sizes)
    values = loss(sizes, flops) + noise * draws.normal(size=num_sizes)
    found = fit_size_curve(flops, sizes, values, "falls")
    yield "best size", found.best_interval, best_size(flops)
    yield "least loss", found.value_interval, best_loss(flops)


def points(
    draws: np.random.Generator, sizes_at: Truth, loss_at: Any, budgets: Any, noise: float
) -> list[Point]:
    return [
        Point(
            family="one",
            size=str(number),
            parameters=round(size),
            tokens=round(flops / (6 * size)),
            budget=flops / 1e18,
            flops=dict.fromkeys(("paper", "model", "executed"), round(flops)),
            kind="run",
            metrics={"loss": float(loss_at(size, flops) + noise * draws.normal())},
        )
        for flops in budgets
        for number, size in enumerate(sizes_at(flops))
    ]


def growth(draws: np.random.Generator, *, num_sizes: int, num_budgets: int) -> Found:
    """Sizes that move with the budget, as in Hoffmann et al. 2022."""
    budgets = np.geomspace(1e19, 1e21, num_budgets)
    around = 1.3 * np.geomspace(0.25, 4, num_sizes)
    measured = points(draws, lambda flops: around * best_size(flops), loss, budgets, 0.005)
    found = fit_isoflop(measured, "loss", "falls", "model").growth
    uncertainty = found.exponent_interval if isinstance(found, Growth) else None
    yield "growth exponent", uncertainty, BETA / (ALPHA + BETA)


def law_intervals(law: PowerLaw | NotFitted, truth: Truth) -> Found:
    """Of the curve at the least and most compute and at 10 times the most."""
    assert isinstance(law, PowerLaw)
    places = {"least": law.flops[0], "most": law.flops[-1], "10 x most": 10 * law.flops[-1]}
    for name, flops in places.items():
        yield f"curve at the {name} compute", law.interval_at(flops), truth(flops)


def frontier_of(
    draws: np.random.Generator, *, num_sizes: int, num_budgets: int, is_flat: bool
) -> Found:
    """The same sizes at all budgets: equally good ones, or those of a surface."""
    budgets = np.geomspace(1e19, 1e21, num_budgets)
    middle = best_size(1e20)

    def flat(size: Any, flops: Any) -> Any:
        return best_loss(flops) + 0 * size

    sizes = middle * np.geomspace(32**-0.5, 32**0.5, num_sizes)
    measured = points(draws, lambda flops: sizes, flat if is_flat else loss, budgets, 0.005)
    best = frontier(measured, "loss", "falls", "model")
    yield from law_intervals(fit_power_law(best.flops, best.values, "falls"), best_loss)


def power_law(draws: np.random.Generator, *, num_points: int, rises: bool) -> Found:
    flops = 1e18 * np.geomspace(1, 100, num_points)
    limit, amplitude, exponent = 0.4, 0.3, 0.3

    def metric(at: Any) -> Any:
        y = limit + amplitude * (at / flops[0]) ** -exponent
        return 1 - y if rises else y

    values = metric(flops) + 0.004 * draws.normal(size=num_points)
    law = fit_power_law(flops, values, "rises" if rises else "falls")
    assert isinstance(law, PowerLaw)
    yield "limit", law.limit_interval, 1 - limit if rises else limit
    yield "amplitude", law.amplitude_interval, amplitude
    yield "exponent", law.exponent_interval, exponent
    yield from law_intervals(law, metric)


def surface(draws: np.random.Generator, *, noise: float) -> Found:
    budgets = np.geomspace(1e19, 1e21, 6)
    around = 1.3 * np.geomspace(0.25, 4, 5)
    measured = points(draws, lambda flops: around * best_size(flops), loss, budgets, noise)
    found = fit_surface(measured, "loss", "falls")
    is_fitted = isinstance(found, Surface)
    truths = {"limit": E, "alpha": ALPHA, "beta": BETA, "growth": BETA / (ALPHA + BETA)}
    for name, truth in truths.items():
        yield name, getattr(found, f"{name}_interval") if is_fitted else None, truth


class Setting(NamedTuple):
    what: str  # for people
    draw: Callable[..., Found]
    options: dict[str, Any]


SETTINGS = {
    "isoflop-5-x16": Setting(
        "IsoFLOP, 5 sizes over x16, off center by 1.3, noise 0.002",
        size_curve,
        {"num_sizes": 5, "span": 16, "noise": 0.002},
    ),
    "isoflop-7-x16": Setting(
        "IsoFLOP, 7 sizes over x16, off center by 1.3, noise 0.002",
        size_curve,
        {"num_sizes": 7, "span": 16, "noise": 0.002},
    ),
    "isoflop-7-x256": Setting(
        "IsoFLOP, 7 sizes over x256, off center by 1.3, noise 0.002",
        size_curve,
        {"num_sizes": 7, "span": 256, "noise": 0.002},
    ),
    "isoflop-7-x256-noisy": Setting(
        "IsoFLOP, 7 sizes over x256, off center by 1.3, noise 0.005",
        size_curve,
        {"num_sizes": 7, "span": 256, "noise": 0.005},
    ),
    "growth-5x6": Setting(
        "growth of the best size, 5 sizes, 6 budgets",
        growth,
        {"num_sizes": 5, "num_budgets": 6},
    ),
    "frontier-equal-5x8": Setting(
        "frontier, 5 equally good sizes, 8 budgets",
        frontier_of,
        {"num_sizes": 5, "num_budgets": 8, "is_flat": True},
    ),
    "frontier-equal-3x5": Setting(
        "frontier, 3 equally good sizes, 5 budgets",
        frontier_of,
        {"num_sizes": 3, "num_budgets": 5, "is_flat": True},
    ),
    "frontier-surface-5x8": Setting(
        "frontier, 5 sizes over x32 of a surface, 8 budgets",
        frontier_of,
        {"num_sizes": 5, "num_budgets": 8, "is_flat": False},
    ),
    "power-law-4": Setting("power law, 4 budgets", power_law, {"num_points": 4, "rises": False}),
    "power-law-8": Setting(
        "power law of a share, 8 budgets", power_law, {"num_points": 8, "rises": True}
    ),
    "surface-5x6": Setting("L(N, D), 5 sizes, 6 budgets, noise 0.002", surface, {"noise": 0.002}),
}


def coverage(name: str, num_curves: int) -> dict[str, tuple[int, int]]:
    """By quantity: of how many curves its interval was drawn, and how many held the truth."""
    draws = np.random.default_rng([sum(name.encode()), num_curves])
    setting = SETTINGS[name]
    drawn: collections.Counter[str] = collections.Counter()
    held: collections.Counter[str] = collections.Counter()
    for _ in range(num_curves):
        for quantity, interval, truth in setting.draw(draws, **setting.options):
            drawn[quantity] += interval is not None
            held[quantity] += interval is not None and interval.low <= truth <= interval.high
    return {quantity: (drawn[quantity], held[quantity]) for quantity in drawn}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.scaling.coverage", description=__doc__)
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--curves", type=int, default=200)
    options = parser.parse_args()
    for name in options.setting:
        started = time.process_time()
        for quantity, (drawn, held) in coverage(name, options.curves).items():
            share = f"{held / drawn:.3f}" if drawn else "-"
            print(f"| {SETTINGS[name].what} | {quantity} | {drawn} | {share} |", flush=True)
        print(f"{name}: {time.process_time() - started:.1f} CPU-s", flush=True)


if __name__ == "__main__":
    main()

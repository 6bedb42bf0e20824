"""Which metrics of `cola-train compare` are fitted, and as what.

A metric must be the better the further it falls or rises. The shares of repeated and of distinct
4-grams are not: text can be too wild as well as too bland. Nor is what a judge says of a text, or
the share of known words: bland text does better than real text. Of these the distance to the same
figure of the held-out text is fitted, which falls to a limit of 0 or more.
"""

import dataclasses
from collections.abc import Sequence

from cola_train.config.settings import require
from cola_train.scaling.points import Point
from cola_train.scaling.power_law import Direction

# Fitted as NAME_distance.
_BY_DISTANCE = ("judge_nats_per_token", "judge_nats_per_byte", "known_word_share")
DIRECTIONS: dict[str, Direction] = {
    **{f"{name}_distance": "falls" for name in _BY_DISTANCE},
    "bigram_divergence": "falls",
    "unigram_divergence": "falls",
    "next_word_accuracy": "rises",
}


def with_distances(points: Sequence[Point]) -> list[Point]:
    """The points with the metrics NAME_distance, |NAME - held_out_NAME|, added.

    Their standard errors are NAME's: the real text is the same for all points, so its error moves
    all distances together.

    Raises:
        UserError: a metric that is fitted by its distance stands without the real text's.
    """
    found = [name for name in _BY_DISTANCE if points and name in points[0].metrics]
    for name in found:
        require(
            f"held_out_{name}" in points[0].metrics,
            f"{name} is fitted as the distance to real text, because bland text does better than "
            f"real text by it; the points must have held_out_{name} beside it, and have not. "
            f"`cola-train compare` measures both; or leave {name} out.",
        )
    return [dataclasses.replace(point, metrics=_distances(point, found)) for point in points]


def _distances(point: Point, names: Sequence[str]) -> dict[str, float]:
    metrics = dict(point.metrics)
    for name in names:
        metrics[f"{name}_distance"] = abs(metrics[name] - metrics[f"held_out_{name}"])
        if (error := metrics.get(f"{name}_standard_error")) is not None:
            metrics[f"{name}_distance_standard_error"] = error
    return metrics

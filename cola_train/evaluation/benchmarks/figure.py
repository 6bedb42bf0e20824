"""The benchmarks' figure: accuracies with their intervals, beside the released model's and what
blind choice would give.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cola_train.drawing import BLUE, drawing
from cola_train.evaluation.benchmarks.summary import Row

_WIDTH = 0.38  # of a bar; benchmarks are 1 apart


def draw_benchmarks(rows: Sequence[Row], png: Path, svg: Path) -> None:
    """Draw a pair of bars for each row, in percent; a bar's line is its 95 % interval, a dash the
    accuracy of blind choice.
    """
    with drawing((1.8 + 0.8 * len(rows), 3.2), png, svg, {"axes.grid": False}) as figure:
        axes = figure.add_subplot()
        places = np.arange(len(rows))
        heights = [row.accuracy for row in rows]
        # A percentile interval need not hold the figure that it is of.
        errors = [
            [max(0.0, row.accuracy - row.low) for row in rows],
            [max(0.0, row.high - row.accuracy) for row in rows],
        ]
        axes.bar(
            places - _WIDTH / 2,
            heights,
            _WIDTH,
            color=BLUE,
            label="this checkpoint",
            yerr=errors,
            error_kw={"elinewidth": 0.8},
        )
        axes.bar(
            places + _WIDTH / 2,
            [row.released_accuracy for row in rows],
            _WIDTH,
            color="0.75",
            label="released model",
        )
        chances = [
            (place, row.chance)
            for place, row in zip(places, rows, strict=True)
            if row.chance is not None
        ]
        if chances:
            middles, levels = zip(*chances, strict=True)
            ends = [[middle + side * _WIDTH for middle in middles] for side in (-1, 1)]
            axes.hlines(
                levels,
                *ends,
                color="black",
                linestyle=(0, (2, 1.5)),
                linewidth=1,
                label="an option chosen blindly",
            )
        for row, place in zip(rows, places, strict=True):
            height = max(row.accuracy, row.high) + 0.8
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(
                place - _WIDTH / 2,
                height,
                f"{row.accuracy:.1f}",
                ha="center",
                fontsize=7,
                bbox=behind,
            )
        axes.set_xticks(places, [f"{row.task}\n{row.num_samples:,}" for row in rows])
        axes.set_ylabel("correct (%)")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.25, linewidth=0.5)
        figure.legend(loc="outside upper center", ncols=3)

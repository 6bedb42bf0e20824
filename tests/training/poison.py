"""Trains the config in the folder given, with the last process alone made to go wrong; not a test.

Arguments: the folder; "nan" (in the gradient, the loss stays as it is) or "hang"; the optimizer steps for it, counted from 0.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_train.config.settings import UserError
from cola_train.data.batch import Batch
from cola_train.objectives.objective import Losses
from cola_train.processes import end_process
from cola_train.run_folder import read_run_config
from cola_train.training.loop.module import TextVAEStage
from cola_train.training.run import train


class Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


def main() -> None:
    torch.set_num_threads(1)
    poisoned = {int(step) for step in sys.argv[3:]}
    losses_of = TextVAEStage.losses

    def losses(stage: TextVAEStage, batch: Batch, counts: dict[str, Tensor], step: int) -> Losses:
        losses = losses_of(stage, batch, counts, step)
        if step not in poisoned or stage.processes.rank != stage.processes.world_size - 1:
            return losses
        while sys.argv[2] == "hang":
            time.sleep(1)
        terms = {name: Poison.apply(value) for name, value in losses.terms.items()}
        return dataclasses.replace(losses, terms=terms)

    TextVAEStage.losses = losses  # type: ignore[method-assign]
    try:
        train(read_run_config(Path(sys.argv[1])))
    except UserError as error:
        sys.stderr.write(f"cola-train: error: {error}\n")
        end_process(2)
    end_process(0)


if __name__ == "__main__":
    main()

"""Trains the config in the folder given, with the last process alone made to go wrong; not a test.

Arguments: the folder; "nan" (in the gradient, the loss stays as it is) or "hang"; the optimizer
    steps for it, counted from 0.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cola_train.config.settings import UserError
from cola_train.data.batch import Batch
from cola_train.families.cola.stage1 import Stage1Objective
from cola_train.objectives.objective import Term
from cola_train.processes import end_process
from cola_train.run_folder import read_run_config
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
    plain = Stage1Objective.forward

    def forward(objective: Stage1Objective, batch: Batch, step: int | None = None) -> list[Term]:
        terms = plain(objective, batch, step)
        if step not in poisoned or dist.get_rank() != dist.get_world_size() - 1:
            return terms
        while sys.argv[2] == "hang":
            time.sleep(1)
        return [dataclasses.replace(term, sum=Poison.apply(term.sum)) for term in terms]

    Stage1Objective.forward = forward  # type: ignore[method-assign]
    try:
        train(read_run_config(Path(sys.argv[1])))
    except UserError as error:
        sys.stderr.write(f"cola-train: error: {error}\n")
        end_process(2)
    end_process(0)


if __name__ == "__main__":
    main()

"""A program: steps with compiled blocks beside plain ones, as JSON. Checked types, as in tests,
hide functions from compilers.
"""

import json
import sys
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from cola_train.objectives.objective import Objective, total_loss
from cola_train.training.parallel.blocks import checkpoint_activations, compile_blocks
from tests.flops.counting import build_objective, run_config, training_batch


def step(objective: Objective, config: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step, and its gradients."""
    objective.zero_grad()
    batch = training_batch(config)
    loss = total_loss(objective(batch), objective.counts(batch))
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None
    }


def compared(stage: str, checkpointing: Any) -> dict[str, Any]:
    """How far compiled steps are from plain ones, and how many graphs were compiled after one step
    and after four.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = run_config(stage)
    torch.manual_seed(0)
    objective = build_objective(config)
    plain_loss, plain = step(objective, config)
    checkpoint_activations(objective, checkpointing)
    # Traced and differentiated by torch.compile; the code that inductor would generate takes a
    # minute.
    compile_blocks(objective, backend="aot_eager")
    loss, gradients = step(objective, config)
    counters = torch._dynamo.utils.counters
    graphs = [counters["stats"]["unique_graphs"]]
    for _ in range(3):
        step(objective, config)
    graphs.append(counters["stats"]["unique_graphs"])
    assert gradients.keys() == plain.keys()
    errors = [
        float((gradients[name] - plain[name]).norm() / (plain[name].norm() + 1e-6))
        for name in plain
    ]
    return {
        "loss": abs(loss - plain_loss) / plain_loss,
        "gradients": max(errors),
        "graphs": graphs,
        "breaks": sum(counters["graph_break"].values()),
    }


if __name__ == "__main__":
    print(json.dumps([compared(*case.split("-")) for case in sys.argv[1:]]))

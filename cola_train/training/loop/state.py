"""Everything of a run that changes: its tensors, as they are saved and loaded; its counters."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from cola_train.json_text import parse_json
from cola_train.processes import local_part
from cola_train.training.optim.optimizers import ensure_state

MODEL, EMA_PREFIX = "model", "average"


@dataclasses.dataclass
class RunState:
    """The counters of a run, the same on every process."""

    step: int = 0  # optimizer steps done with, skipped ones included
    tokens: int = 0  # in the rows of these steps, padding included
    flops: dict[str, int] = dataclasses.field(default_factory=dict)  # by convention
    # Clocks, which no two runs have alike.
    seconds: float = dataclasses.field(default=0.0, compare=False)
    device_seconds: float = dataclasses.field(default=0.0, compare=False)
    cpu_seconds: float = dataclasses.field(default=0.0, compare=False)  # this process' x processes
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    validated_step: int = -1  # the step after which validation last ran
    evaluated_step: int = -1  # and evaluation (callbacks/in_loop_evaluation.py)
    # Of taken steps (guard.py), by the names of the loss's terms: an Interval run's phases have
    # different ones.
    recent_losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    alarms: dict[str, Any] = dataclasses.field(default_factory=dict)  # what alarms.py remembers

    def to_json(self) -> str:
        """One line; floats survive exactly."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunState":
        """The inverse of `to_json`."""
        return cls(**parse_json(text))


def fill(objective: nn.Module, values: Iterator[tuple[str, Tensor]]) -> None:
    """Give each tensor its whole value from `values`; the same on any number of processes."""
    state = objective.state_dict()
    missing = {name for name, _ in objective.named_parameters()}
    with torch.no_grad():
        for name, value in values:
            target = state[name]
            if isinstance(target, DTensor):
                mesh = target.device_mesh
                # Every process has the whole value: nothing is sent.
                value = distribute_tensor(
                    value.to(mesh.device_type), mesh, target.placements, src_data_rank=None
                )
            local_part(target).copy_(local_part(value))
            missing.discard(name)
    assert not missing, f"no initial value for {sorted(missing)}"


def saved_tensors(
    objective: nn.Module, optimizer: torch.optim.Optimizer, average: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The run's live tensors by the names they are saved under; loading writes into them.

    model.NAME, average.NAME (where an average is kept), and of each trained parameter what the
    optimizer keeps: exp_avg.NAME, exp_avg_sq.NAME and step.NAME, or momentum_buffer.NAME.
    """
    tensors = {f"{MODEL}.{name}": value for name, value in objective.state_dict().items()}
    tensors |= {f"{EMA_PREFIX}.{name}": value for name, value in average.items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    for parameter, moments in ensure_state(optimizer).items():
        tensors |= {f"{kind}.{names[parameter]}": value for kind, value in moments.items()}
    return tensors

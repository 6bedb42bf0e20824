"""A run's objective, built and sharded for this process, with its memory and its precision."""

from collections.abc import Callable

import torch

from cola_train.config.run import RunConfig
from cola_train.families.registry import family_of
from cola_train.models.blocks import reset_buffers
from cola_train.objectives.objective import Objective
from cola_train.processes import Processes
from cola_train.training.parallel.blocks import (
    checkpoint_activations,
    compile_blocks,
    multiply_in_fp8,
)
from cola_train.training.parallel.sharding import build_mesh, shard


def build_sharded(
    config: RunConfig,
    processes: Processes,
    change: Callable[[Objective], object] = lambda objective: None,
) -> Objective:
    """The objective on the meta device, in parts for this process; `change` comes before."""
    parallel = config.parallel
    with torch.device("meta"):
        objective = family_of(config).build(config)
    change(objective)
    if config.trainer.precision == "fp8":
        multiply_in_fp8(objective)
    checkpoint_activations(objective, parallel.activation_checkpointing)
    if config.trainer.compile:
        compile_blocks(objective)
    mesh = build_mesh(parallel, processes, processes.device.type)
    shard(objective, mesh, config.trainer.in_bf16, parallel.cpu_offload)
    return objective


def materialize(objective: Objective, config: RunConfig, processes: Processes) -> None:
    """Give a sharded objective memory, and its buffers their values; parameters have none yet."""
    objective.to_empty(device="cpu" if config.parallel.cpu_offload else processes.device)
    reset_buffers(objective)


def computing(config: RunConfig, processes: Processes) -> torch.autocast:
    """The forward's precision: fp32, or bf16 with norms, softmax and residuals in fp32."""
    return torch.autocast(processes.device.type, torch.bfloat16, enabled=config.trainer.in_bf16)

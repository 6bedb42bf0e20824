"""How a run is spread over processes: FSDP2, whose mesh makes it single, DDP, sharded or hybrid."""

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from cola_train.config.loop import ParallelConfig
from cola_train.config.settings import require
from cola_train.models.blocks import Block
from cola_train.models.vocabulary_head import VocabularyHead
from cola_train.processes import Processes


def check_mesh(config: ParallelConfig, processes: Processes) -> None:
    """A UserError for `single` with several processes, or a shard_size that divides them not."""
    world_size = processes.world_size
    require(
        config.strategy != "single" or world_size == 1,
        f"parallel.strategy=single is for one process, not {world_size}; use ddp, fsdp2 or hsdp.",
    )
    shard_size = _shard_size(config, processes)
    require(
        world_size % shard_size == 0,
        f"parallel.shard_size ({shard_size}) must divide the number of processes ({world_size}).",
    )


def _shard_size(config: ParallelConfig, processes: Processes) -> int:
    if config.strategy == "ddp":
        return 1
    if config.strategy == "hsdp":
        return config.shard_size or processes.local_world_size
    return processes.world_size


def build_mesh(config: ParallelConfig, processes: Processes, device_type: str) -> DeviceMesh:
    """(shard,) for fsdp2 or one process, else (replicate, shard); a shard of ddp is one process."""
    shard_size = _shard_size(config, processes)
    if shard_size == processes.world_size:
        return init_device_mesh(device_type, (shard_size,), mesh_dim_names=("shard",))
    shape = (processes.world_size // shard_size, shard_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def sharding_units(objective: nn.Module) -> list[nn.Module]:
    """What is gathered as a whole: blocks, token embeddings and heads; the rest is the root's."""
    kinds = (Block, nn.Embedding, VocabularyHead)
    return [module for module in objective.modules() if isinstance(module, kinds)]


def shard(objective: nn.Module, mesh: DeviceMesh, bf16: bool, cpu_offload: bool) -> None:
    """FSDP2 over the units, and over the objective as root: every forward goes through it.

    With `bf16` weights are gathered in bf16 while their masters, and the sums of gradients, stay
    fp32; the forward itself runs under autocast (build.py), which keeps norms, softmax and
    residuals in fp32.
    """
    precision = MixedPrecisionPolicy()
    if bf16:
        # Inputs are not cast: among them are counts, which bf16 would round.
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    on_gpu = mesh.device_type == "cuda"
    offload = CPUOffloadPolicy(pin_memory=on_gpu) if cpu_offload else OffloadPolicy()
    for module in (*sharding_units(objective), objective):
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
    # A linear layer over rows gives a view; nothing here writes into its output.
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module .* returned a view tensor")


def gather_each_once(objective: nn.Module) -> None:
    """Gather and free every unit, one at a time; before the first step.

    When FSDP2 accumulates gradients in another type than the weights', it fails over a unit that
    was never gathered, such as the decoder of a frozen VAE, which a run does not use.
    """
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()

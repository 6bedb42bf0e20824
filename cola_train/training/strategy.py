"""How a run is spread over processes: one strategy for any number of them, with checkpoints that a crash cannot spoil."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from cola_train.files import atomic_folder
from cola_train.models.dit import DiTBlock
from cola_train.models.text_vae import TextVAEBlock


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, one included, with sharded checkpoints that appear whole or not at all."""

    def __init__(self, num_processes: int) -> None:
        """`num_processes`: all of them, over all nodes."""
        super().__init__(data_parallel_size=num_processes, tensor_parallel_size=1)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        """Save beside `filepath`, make it durable, then rename: a folder of that name is always complete."""
        final = Path(self.broadcast(str(filepath)))
        if self.global_rank != 0:
            working = Path(self.broadcast(""))
            super().save_checkpoint(checkpoint, working, storage_options)
            self.barrier()
            return
        with atomic_folder(final) as working:
            self.broadcast(str(working))
            super().save_checkpoint(checkpoint, working, storage_options)
        self.barrier()


def shard(objective: nn.Module, mesh: DeviceMesh) -> None:
    """Make every transformer block a sharding unit and the objective the root: all goes through its forward, where hooks fire."""
    for module in objective.modules():
        if isinstance(module, (TextVAEBlock, DiTBlock)):
            fully_shard(module, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def sync_gradients_only_if(objective: nn.Module, last: bool) -> None:
    """Reduce gradients over processes in a step's last micro-batch alone."""
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(last)

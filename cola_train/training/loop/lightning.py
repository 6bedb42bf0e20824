"""All that touches Lightning's private sides, or keeps it from doing what we do ourselves.

Lightning drives the loop, the callbacks and the strategy. It does not save, resume, validate,
launch or handle signals: each of those broke exact resumption or hung with several processes
(docs/design.md, decision 9).
"""

import logging
import warnings

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy

from cola_train.config.run import RunConfig
from cola_train.devices import uses_gpu
from cola_train.processes import Processes


def build_trainer(
    config: RunConfig, processes: Processes, callbacks: list[pl.Callback]
) -> pl.Trainer:
    """Lightning's loop over this process' part of a run, without what we do ourselves."""
    # Its advertisements and advice do not fit; its errors still come through.
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    trainer = pl.Trainer(
        accelerator="gpu" if uses_gpu(config.trainer.accelerator) else "cpu",
        devices=processes.local_world_size,
        num_nodes=processes.world_size // processes.local_world_size,
        strategy=ShardedStrategy(processes),
        plugins=[LaunchedEnvironment(processes)],
        # What is computed in bf16 is said elsewhere (parallel/build.py); to Lightning all is fp32.
        precision="32-true",
        # A callback ends the loop (fit.py): Lightning's counters do not continue in a resumed run.
        max_steps=-1,
        max_epochs=-1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    # Lightning broadcasts inside its signal handler, amid any collective of ours.
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's, except that the stage places and saves its own tensors (`configure_model`)."""

    def __init__(self, processes: Processes) -> None:
        super().__init__(data_parallel_size=processes.world_size, tensor_parallel_size=1)

    def model_to_device(self) -> None:
        """Nothing: weights that are offloaded must not be moved."""


class LaunchedEnvironment(LightningEnvironment):
    """Tells Lightning about `Processes`: it neither starts any nor reads SLURM's variables.

    It works out the rank from these; address and port are not used, the group is connected already.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self._processes = processes

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._processes.local_rank

    def node_rank(self) -> int:
        # machines have equally many processes
        return self._processes.rank // self._processes.local_world_size

    def teardown(self) -> None:
        """Nothing: the launcher's variables are there for the next run too."""

"""Where a run's tensors come from: drawn, an exported checkpoint, another run's weights, or its own last checkpoint."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cola_train.config.runs import BaselineRunConfig, ColaRunConfig, JointRunConfig, RunConfig
from cola_train.config.settings import UserError
from cola_train.data.progress import say
from cola_train.hf_format import dit_tensors, vae_tensors
from cola_train.models.initialise import dit_value, text_vae_value, transformer_value
from cola_train.processes import Processes
from cola_train.training.checkpoint import (
    Manifest,
    damage,
    latest_checkpoint,
    point_to,
    read_manifest,
    refuse_damage,
    saved_steps,
    set_aside,
    step_folder,
)
from cola_train.training.checkpoint_io import CheckpointReader
from cola_train.training.module import StageModule
from cola_train.training.state import MODEL, RunState, fill
from cola_train.training.strategy import gather_each_once

Saved = tuple[Path, Manifest]


class Start(pl.Callback):
    """Gives the sharded stage its values, once it has its optimizer."""

    def __init__(self, config: RunConfig, own: Saved | None, warm: Saved | None) -> None:
        """`own`: the checkpoint to go on from; `warm`: another run's, for its weights alone; drawn or imported without either."""
        self.config, self.own, self.warm = config, own, warm

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A collective call."""
        assert isinstance(pl_module, StageModule)
        pl_module.watchdog.beat("reading or drawing the weights")
        if self.own is not None:
            folder, manifest = self.own
            CheckpointReader(folder, manifest).load(pl_module.saved_tensors())
            pl_module.state = RunState.from_json(manifest.state.to_json())
        else:
            self._begin(pl_module)
        gather_each_once(pl_module.objective)

    def _begin(self, pl_module: StageModule) -> None:
        if self.warm is not None:
            names = {f"{MODEL}.{name}": value for name, value in pl_module.objective.state_dict().items()}
            CheckpointReader(*self.warm).load(names)
        else:
            fill(pl_module.objective, initial_values(self.config, pl_module.objective))
        pl_module.average.start()


def initial_values(config: RunConfig, objective: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a new run's objective, whole, one at a time: a function of the seed and the name, or read from an export."""
    shapes = {name: parameter.shape for name, parameter in objective.named_parameters()}
    reads: dict[str, Iterator[tuple[str, Tensor]]] = {}
    if isinstance(config, JointRunConfig):
        if config.init_vae_from is not None:
            reads["vae"] = vae_tensors(config.init_vae_from, config.vae)
        if config.init_dit_from is not None:
            reads["dit"] = dit_tensors(config.init_dit_from, config.dit)
    for network in ("vae", "dit", "transformer"):
        for name, value in reads.get(network) or _drawn(config, network, shapes):
            yield f"{network}.{name}", value
            reference = f"reference_{name}"  # of the VAE's encoder.X
            if network == "vae" and reference in shapes:
                yield reference, value


def _drawn(config: RunConfig, network: str, shapes: Mapping[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    for full_name, shape in shapes.items():
        name = full_name.removeprefix(f"{network}.")
        if name == full_name:
            continue
        if isinstance(config, ColaRunConfig):
            vae = network == "vae"
            yield name, text_vae_value(name, shape, config.vae, config.seed) if vae else dit_value(name, shape, config.seed)
        elif isinstance(config, BaselineRunConfig):
            yield name, transformer_value(name, shape, config.transformer, config.seed)


def intact_checkpoint(run_folder: Path, processes: Processes, if_damaged: str) -> Saved | None:
    """The checkpoint to go on from, every file of it checked by one of the processes; None in a run that has saved nothing yet.

    With `if_damaged` "previous", damaged ones are put aside under another name and the newest intact one is taken.

    Raises:
        UserError: it is damaged, and `if_damaged` is "stop" or there is no other.
    """
    while True:
        folder = processes.agree(lambda: _newest(run_folder, if_damaged))
        if folder is None:
            return None
        try:
            return folder, checked(folder, processes)
        except UserError as error:
            if if_damaged == "stop" or len(processes.agree(lambda: saved_steps(run_folder))) == 1:
                raise
            if processes.is_first:
                say(f"cola-train: warning: {error}")
            aside = processes.agree(functools.partial(set_aside, folder))
            if processes.is_first:
                say(f"cola-train: warning: it is kept as {aside}; going on from the checkpoint before it.")


def _newest(run_folder: Path, if_damaged: str) -> Path | None:
    try:
        return latest_checkpoint(run_folder)
    except UserError:
        steps = saved_steps(run_folder)
        if if_damaged == "stop" or not steps:
            raise
    folder = step_folder(run_folder, steps[-1])
    point_to(folder)
    return folder


def checked(folder: Path, processes: Processes) -> Manifest:
    """A checkpoint's manifest, once all its files are known to be as they were written; a collective call.

    Raises:
        UserError: each file that is not.
    """
    manifest = processes.agree(lambda: read_manifest(folder))
    mine = dict(list(manifest.files.items())[processes.rank :: processes.world_size])
    found: list[list[str]] = [[] for _ in range(processes.world_size)]
    dist.all_gather_object(found, damage(folder, mine))
    refuse_damage(folder, [line for part in found for line in part])
    return manifest

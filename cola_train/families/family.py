"""What a family of models brings: all that the rest of the program asks of a kind of model.

The project's are Cola DLM's two stages ("vae", "joint") and the baselines ("ar", "llada"). To add
one, write a subclass and register it (registry.py). Its module is imported to list verbs, so torch
is imported inside methods alone: a wrong config is then refused before that.
"""

import abc
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from cola_train.config.loop import AlarmsConfig
from cola_train.config.run import RunConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.data.prepared import PreparedData
    from cola_train.data.tokenizer import Tokenizer
    from cola_train.families.checkpoint import Checkpoint
    from cola_train.flops.work import Parts
    from cola_train.objectives.objective import Objective

RunT = TypeVar("RunT", bound=RunConfig)


@dataclasses.dataclass(frozen=True)
class TrainedRun(Generic[RunT]):
    """A run at one of its steps: what its checkpoint is made of.

    Attributes:
        config: the run's.
        weights: the objective's tensors, by name; may be read from disk when asked for.
        tokenizer: goes along.
        training: what the checkpoint says of its run (stage, step, seq_len, run, mask_documents).
    """

    config: RunT
    weights: "Mapping[str, Tensor]"
    tokenizer: "Tokenizer"
    training: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Training steps of equal cost: `num_steps` of a cycle, whose `step_work` goes by `name`."""

    name: str
    num_steps: int


@dataclasses.dataclass(frozen=True)
class MatchTarget:
    """The size that other families' networks are matched to.

    Attributes:
        width: of the residual stream.
        num_layers: transformer blocks.
        head_dim: channels of an attention head.
        notes: what a reader of the match must know of the run, a sentence each.
    """

    width: int
    num_layers: int
    head_dim: int
    notes: tuple[str, ...] = ()


class Family(abc.ABC, Generic[RunT]):
    """One kind of model.

    Attributes:
        name: the verb that trains it, and `stage:` in a saved config.
        config: the class of its run configs; importing it does not import torch.
        summary: the verb's help.
        example: a config file to start from, for the verb's help.
        writes_text: whether its checkpoints generate.
        has_latents: whether its checkpoints have latents to inspect.
        workloads: for `cola-train bench`: settings over the config's defaults, by the workload's
            name.
        generation_workloads: for `bench sample`: a name, and the workload whose networks generate.
        stage1_key: the setting that names a first stage whose cost is part of a run's; None where
            there is none.
    """

    name: ClassVar[str]
    config: type[RunT]
    summary: ClassVar[str]
    example: ClassVar[str]
    writes_text: ClassVar[bool] = True
    has_latents: ClassVar[bool] = False
    workloads: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    generation_workloads: ClassVar[Mapping[str, str]] = {}
    stage1_key: ClassVar[str | None] = None

    # Training.

    @abc.abstractmethod
    def build(self, config: RunT) -> "Objective":
        """The objective with its networks, without values; called on the meta device."""

    @abc.abstractmethod
    def initial_values(
        self, config: RunT, shapes: Mapping[str, "torch.Size"]
    ) -> Iterator[tuple[str, "Tensor"]]:
        """Each tensor of a new run's objective, by name, from the seed or read from a file."""

    def check_data(self, config: RunT, data: "PreparedData") -> None:
        """Refuse data that a run cannot use, before it exists or goes on.

        Raises:
            UserError: what does not fit.
        """

    def check_start(self, config: RunT, data: "PreparedData") -> None:
        """Refuse other runs that this one starts from; not asked once it has a checkpoint.

        Raises:
            UserError: what is not there, or does not fit.
        """

    def alarms(self, config: RunT) -> AlarmsConfig:
        """A run's alarm thresholds, without those that mean nothing for the run."""
        return config.alarms

    # Compute. All in whole FLOPs, from the config alone.

    def phases(self, config: RunT) -> Sequence[Phase]:
        """The cycle of phases that steps go through, from step 0; one phase by default."""
        return (Phase("", 1),)

    @abc.abstractmethod
    def step_work(self, config: RunT, phase: str) -> "Parts":
        """Work of an optimizer step over all rows, by NETWORK.linear, .attention, .head, .adaln."""

    @abc.abstractmethod
    def parameters(self, config: RunT) -> dict[str, int]:
        """Trained parameters, by part: NETWORK.embedding, .linear, .norms, .head, .adaln."""

    def backbone_parameters(self, config: RunT) -> int:
        """N of the paper's 6 N D: by default all but token embeddings and vocabulary heads."""
        return sum(
            count
            for part, count in self.parameters(config).items()
            if not part.endswith((".embedding", ".head"))
        )

    # Checkpoints.

    @abc.abstractmethod
    def write(
        self, folder: Path, run: TrainedRun[RunT], *, replace: bool, max_shard_bytes: int
    ) -> None:
        """Write the layout that a checkpoint ships in, atomically, one file's tensors at a time.

        `replace` allows an existing folder to be swapped for the new one; `max_shard_bytes` is the
        most that a file of weights holds, but for a single larger tensor.
        """

    @abc.abstractmethod
    def recognizes(self, folder: Path) -> bool:
        """Whether a folder is a checkpoint of this family, by its layout."""

    @abc.abstractmethod
    def load(self, folder: Path, device: "str | torch.device" = "cpu") -> "Checkpoint":
        """Read a folder that it recognizes.

        Raises:
            UserError: a config field that is unknown or unsupported; any tensor missing, unexpected
                or of the wrong shape (all are named); a truncated file; a tokenizer with more ids
                than the networks.
        """

    @abc.abstractmethod
    def checkpoint(self, run: TrainedRun[RunT], device: "str | torch.device") -> "Checkpoint":
        """A run's checkpoint in memory, as an export would hold it."""

    def reference(self, run: TrainedRun[RunT], device: "str | torch.device") -> "Checkpoint | None":
        """What the run measures drift from, as a checkpoint in memory; None if it holds none."""
        return None

    # Around many runs.

    @abc.abstractmethod
    def shrink(self, config: RunT, num_steps: int) -> dict[str, Any]:
        """Fields to replace for a copy that trains in minutes from scratch (`cola-train chaos`)."""

    def uncounted_start(self, config: RunT) -> str | None:
        """The run whose compute went into this one before step 0; None if there is none."""
        return None

    def match_target(self, config: RunT) -> MatchTarget | None:
        """What others are matched to, where a run can be; None by default."""
        return None

    def matched(
        self, config: RunConfig, target: MatchTarget, width: int, num_layers: int
    ) -> RunT | None:
        """A config like `config`, of another family, at this width and depth; None if not possible.

        Parameters and FLOPs must be affine in `num_layers`, and `width` a multiple of the target's
        head_dim.
        """
        return None

    @abc.abstractmethod
    def describe(self, config: RunT) -> str:
        """The networks' sizes in a few words."""

    def growth_settings(self, config: RunT, size: str, value: int) -> tuple[str, ...] | None:
        """Overrides that give a run's backbone a size, for `cola-train bench growth`.

        `size` is "block_size", "layers" or "width". () if the run has that value already, None
        where the family's cannot be varied so.

        Raises:
            UserError: a value that the config cannot take.
        """
        return None

"""What the transformer baselines share: their run config, and what they are as families."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from cola_train.config.load import value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import section
from cola_train.families.family import Family, MatchTarget, TrainedRun
from cola_train.flops.passes import Block, Span, named, row_pairs, stack
from cola_train.flops.work import Backward, Extent, Linear, Parts, product
from cola_train.models.config import TransformerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.families.transformer.checkpoint import Kind, TransformerCheckpoint

# For `cola-train chaos`.
_SMALL_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class BaselineRunConfig(RunConfig):
    """What both baselines share."""

    transformer: TransformerConfig = section(TransformerConfig, help="The network.")

    vocab_size_key = "transformer.vocab_size"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.in_loop_eval.check_family(("likelihood", "benchmarks"), self.stage)

    @property
    def masks_documents(self) -> bool:
        return bool(value_at(self, "objective.mask_documents"))


BaselineT = TypeVar("BaselineT", bound=BaselineRunConfig)


class TransformerFamily(Family[BaselineT]):
    """A transformer over tokens; subclasses say what it predicts and how it is sampled."""

    objective: ClassVar[Callable[..., Any]]  # the class of the objective's settings

    @abc.abstractmethod
    def checkpoint_class(self) -> "type[TransformerCheckpoint]":
        """The class of the family's checkpoints, which imports torch."""

    @property
    def _kind(self) -> "Kind":
        return self.checkpoint_class().kind

    def initial_values(
        self, config: BaselineT, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        from cola_train.models.initialize import transformer_value

        for name, shape in shapes.items():
            inner = name.removeprefix("transformer.")
            yield name, transformer_value(inner, shape, config.transformer, config.seed)

    def step_work(self, config: BaselineT, phase: str) -> Parts:
        causal, recomputes = self._kind.causal, config.parallel.activation_checkpointing == "full"
        rows, seq = config.trainer.global_batch_size, config.data.seq_len
        pairs = row_pairs(seq, 1 if causal else seq, config.masks_documents)
        span = Span.all_read(rows * seq, pairs * rows)
        # A row's first token is predicted where each document begins after a separator of its own.
        logits = Extent.of(rows * (seq - (causal and not config.masks_documents)))
        backward = Backward(runs=True, recomputes_blocks=recomputes)
        return named("transformer", transformer_pass(config.transformer, span, logits, backward))

    def parameters(self, config: BaselineT) -> dict[str, int]:
        return dict(_parameters(config.transformer, self._kind.causal))

    def write(
        self, folder: Path, run: TrainedRun[BaselineT], *, replace: bool, max_shard_bytes: int
    ) -> None:
        from cola_train.families.transformer.checkpoint import write_transformer
        from cola_train.tensor_files import Below

        write_transformer(
            folder,
            run.config.transformer,
            Below(run.weights, "transformer."),
            self._kind,
            run.tokenizer,
            run.training,
            replace=replace,
            max_shard_bytes=max_shard_bytes,
        )

    def recognizes(self, folder: Path) -> bool:
        if not (folder / "config.json").is_file():
            return False
        from cola_train.families.transformer.checkpoint import model_type_of

        return model_type_of(folder) == self._kind.model_type

    def load(self, folder: Path, device: "str | torch.device" = "cpu") -> "TransformerCheckpoint":
        return self.checkpoint_class().load(folder, device)

    def checkpoint(
        self, run: TrainedRun[BaselineT], device: "str | torch.device"
    ) -> "TransformerCheckpoint":
        from cola_train.models.transformer import Transformer
        from cola_train.tensor_files import Below

        transformer = Transformer(run.config.transformer, self._kind.causal)
        transformer.load_state_dict(dict(Below(run.weights, "transformer.")))
        transformer.to(device).eval().requires_grad_(False)
        return self.checkpoint_class()(transformer, run.tokenizer, dict(run.training))

    def shrink(self, config: BaselineT, num_steps: int) -> dict[str, Any]:
        sizes = config.transformer
        width: dict[str, Any] = {}
        if sizes.hidden_size > _SMALL_WIDTH:
            width = {"hidden_size": _SMALL_WIDTH, "num_attention_heads": 2, "head_dim": 16}
        small = dataclasses.replace(
            sizes,
            **width,
            num_hidden_layers=min(sizes.num_hidden_layers, 2),
            intermediate_size=min(sizes.intermediate_size, 2 * _SMALL_WIDTH),
        )
        return {"transformer": small}

    def matched(
        self, config: RunConfig, target: MatchTarget, width: int, num_layers: int
    ) -> BaselineT:
        """The feed-forward is four times as wide, and heads are as wide as the target's.

        Data, order, seeds, optimization and loop are shared; the paper's N counts its parameters.
        """
        shared = {
            field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)
        }
        changes = {
            "stage": self.name,
            "name": f"{config.name}_{self.name}",
            "budget": dataclasses.replace(config.budget, eflops=None, nominal_parameters=None),
            "warm_start_from": None,
            "branched_from": None,
            "objective": self.objective(mask_documents=config.masks_documents),
            "transformer": TransformerConfig(
                vocab_size=config.vocab_size,
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=num_layers,
                num_attention_heads=width // target.head_dim,
                head_dim=target.head_dim,
            ),
        }
        return self.config(**{**shared, **changes})

    def describe(self, config: BaselineT) -> str:
        return f"{config.transformer.num_hidden_layers} x {config.transformer.hidden_size}"


def transformer_pass(
    config: TransformerConfig, span: Span, logits: Extent, backward: Backward
) -> Parts:
    """A baseline's transformer; `logits` are the positions that the head runs on."""
    dim, hidden = config.hidden_size, config.intermediate_size
    block = Block(
        dim,
        config.num_attention_heads * config.head_dim,
        mlp=(Linear(dim, 2 * hidden), Linear(hidden, dim)),
        ends_with_product=True,
    )
    parts = stack(block, config.num_hidden_layers, span, backward)
    return parts | {"head": product(Linear(dim, config.vocab_size), logits, backward)}


@functools.lru_cache
def _parameters(config: TransformerConfig, causal: bool) -> Mapping[str, int]:
    from cola_train.models.blocks import parameters_by_part
    from cola_train.models.transformer import Transformer

    return named("transformer", parameters_by_part(lambda: Transformer(config, causal)))

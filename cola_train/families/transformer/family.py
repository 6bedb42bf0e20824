"""What both transformer baselines share as families."""

import abc
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cola_train.config.run import RunConfig
from cola_train.families.family import Family, MatchTarget
from cola_train.families.transformer.config import BaselineRunConfig
from cola_train.models.config import TransformerConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cola_train.data.tokenizer import Tokenizer
    from cola_train.families.transformer.checkpoint import TransformerCheckpoint
    from cola_train.flops.work import Parts

BaselineT = TypeVar("BaselineT", bound=BaselineRunConfig)
# For `cola-train chaos`.
_SMALL_WIDTH = 32


class TransformerFamily(Family[BaselineT]):
    """A transformer over tokens, trained and sampled in one way or another."""

    @abc.abstractmethod
    def checkpoint_class(self) -> "type[TransformerCheckpoint]":
        """The class of the family's checkpoints, which imports torch; its `kind` says whether the
        transformer is causal.
        """

    @abc.abstractmethod
    def matched_objective(self, mask_documents: bool) -> Any:
        """The objective's settings of a run that is matched to another."""

    @property
    def _causal(self) -> bool:
        return self.checkpoint_class().kind.causal

    def initial_values(
        self, config: BaselineT, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        """Drawn."""
        from cola_train.models.initialize import transformer_value

        for name, shape in shapes.items():
            yield (
                name,
                transformer_value(
                    name.removeprefix("transformer."), shape, config.transformer, config.seed
                ),
            )

    def step_work(self, config: BaselineT, phase: str) -> "Parts":
        """Every step is alike."""
        from cola_train.families.transformer.flops import step_work

        return step_work(config, self._causal)

    def parameters(self, config: BaselineT) -> dict[str, int]:
        """The transformer's."""
        return dict(_parameters(config.transformer, self._causal))

    def write(
        self,
        folder: Path,
        config: BaselineT,
        weights: "Mapping[str, Tensor]",
        tokenizer: "Tokenizer",
        training: Mapping[str, Any],
        *,
        replace: bool,
        max_shard_bytes: int,
    ) -> None:
        """Hugging Face's Llama folder, or the same with a [mask] row."""
        from cola_train.families.transformer.format import write_transformer
        from cola_train.tensor_files import Below

        write_transformer(
            folder,
            config.transformer,
            Below(weights, "transformer."),
            self.checkpoint_class().kind,
            tokenizer,
            training,
            replace=replace,
            max_shard_bytes=max_shard_bytes,
        )

    def recognizes(self, folder: Path) -> bool:
        """A config.json with the family's model_type."""
        if not (folder / "config.json").is_file():
            return False
        from cola_train.families.transformer.format import model_type_of

        return model_type_of(folder) == self.checkpoint_class().kind.model_type

    def load(self, folder: Path, device: "str | torch.device" = "cpu") -> "TransformerCheckpoint":
        """A folder that `write` wrote."""
        return self.checkpoint_class().load(folder, device)

    def checkpoint(
        self,
        config: BaselineT,
        weights: "Mapping[str, Tensor]",
        tokenizer: "Tokenizer",
        training: Mapping[str, Any],
        device: "str | torch.device",
    ) -> "TransformerCheckpoint":
        """As an export would hold it."""
        from cola_train.models.transformer import Transformer
        from cola_train.tensor_files import Below

        transformer = Transformer(config.transformer, self._causal)
        transformer.load_state_dict(dict(Below(weights, "transformer.")))
        return self.checkpoint_class()(
            transformer.to(device).eval().requires_grad_(False), tokenizer, dict(training)
        )

    def shrink(self, config: BaselineT, num_steps: int) -> dict[str, Any]:
        """Narrow, of two layers."""
        sizes = config.transformer
        width: dict[str, Any] = {}
        if sizes.hidden_size > _SMALL_WIDTH:
            width = {"hidden_size": _SMALL_WIDTH, "num_attention_heads": 2, "head_dim": 16}
        layers, ffn = (
            min(sizes.num_hidden_layers, 2),
            min(sizes.intermediate_size, 2 * _SMALL_WIDTH),
        )
        return {
            "transformer": dataclasses.replace(
                sizes, **width, num_hidden_layers=layers, intermediate_size=ffn
            )
        }

    def matched(
        self, config: RunConfig, target: MatchTarget, width: int, num_layers: int
    ) -> BaselineT:
        """The feed-forward is four times as wide, and heads are as wide as the target's.

        It shares data, order, seeds, optimization and loop; the paper's convention counts its own
        parameters.
        """
        shared = {
            field.name: getattr(config, field.name)
            for field in dataclasses.fields(RunConfig)
            if field.name != "stage"
        }
        changes = {
            "name": f"{config.name}_{self.name}",
            "budget": dataclasses.replace(config.budget, eflops=None, nominal_parameters=None),
            "warm_start_from": None,
            "branched_from": None,
            "objective": self.matched_objective(config.masks_documents),
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
        """Layers x width."""
        return f"{config.transformer.num_hidden_layers} x {config.transformer.hidden_size}"


@functools.lru_cache
def _parameters(config: TransformerConfig, causal: bool) -> Mapping[str, int]:
    import torch

    from cola_train.flops.passes import named
    from cola_train.models.blocks import parameters_by_part
    from cola_train.models.transformer import Transformer

    with torch.device("meta"):
        return named("transformer", parameters_by_part(Transformer(config, causal)))

"""A table of bigrams of low rank: log p(next | token) = softmax(head(embedding(token)))."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cola_train.config.run import RunConfig
from cola_train.config.settings import Settings, at_least, section, setting
from cola_train.families.family import Family, TrainedRun

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bigram.model import BigramCheckpoint, BigramObjective
    from cola_train.flops.work import Parts


@dataclasses.dataclass(frozen=True)
class TableConfig(Settings):
    """The table."""

    vocab_size: int = setting(320, help="Number of token ids.")
    rank: int = setting(8, help="Of the table.", rule=at_least(1))


@dataclasses.dataclass(frozen=True)
class BigramRunConfig(RunConfig):
    """`cola-train bigram`."""

    stage: Literal["bigram"] = setting("bigram", help="The family that a saved config is of.")
    table: TableConfig = section(TableConfig, help="The table.")

    @property
    def vocab_size_key(self) -> str:
        return "table.vocab_size"


class BigramFamily(Family[BigramRunConfig]):
    """The seam, from outside."""

    name = "bigram"
    config = BigramRunConfig
    summary = "train a table of bigrams"
    example = "bigram.yaml"

    def build(self, config: BigramRunConfig) -> "BigramObjective":
        from bigram.model import BigramObjective, Table

        return BigramObjective(Table(config.table))

    def initial_values(
        self, config: BigramRunConfig, shapes: "Mapping[str, torch.Size]"
    ) -> "Iterator[tuple[str, Tensor]]":
        import torch

        from cola_train.randomness import named_generator

        for name, shape in shapes.items():
            yield name, 0.1 * torch.randn(shape, generator=named_generator(config.seed, name))

    def step_work(self, config: BigramRunConfig, phase: str) -> "Parts":
        from bigram.model import table_pass
        from cola_train.flops.work import Backward

        positions = config.trainer.global_batch_size * (config.data.seq_len - 1)
        return table_pass(config.table, positions, Backward(runs=True))

    def parameters(self, config: BigramRunConfig) -> dict[str, int]:
        size = config.table.vocab_size * config.table.rank
        return {"table.embedding": size, "table.head": size}

    def backbone_parameters(self, config: BigramRunConfig) -> int:
        return sum(self.parameters(config).values())

    def write(
        self, folder: Path, run: TrainedRun[BigramRunConfig], *, replace: bool, max_shard_bytes: int
    ) -> None:
        from bigram.model import write_table

        write_table(
            folder, run.config.table, run.weights, run.tokenizer, run.training, replace=replace
        )

    def recognizes(self, folder: Path) -> bool:
        return (folder / "bigram.json").is_file()

    def load(self, folder: Path, device: "str | torch.device" = "cpu") -> "BigramCheckpoint":
        from bigram.model import BigramCheckpoint, Table
        from cola_train.data.tokenizer import Tokenizer
        from cola_train.tensor_files import load_tensors

        fields = json.loads((folder / "bigram.json").read_text())
        table = Table(TableConfig(**fields["table"]))
        load_tensors(table, folder)
        return BigramCheckpoint(
            table.to(device), Tokenizer.load(folder / "tokenizer.json"), fields["training"]
        )

    def checkpoint(
        self, run: TrainedRun[BigramRunConfig], device: "str | torch.device"
    ) -> "BigramCheckpoint":
        from bigram.model import BigramCheckpoint, Table
        from cola_train.tensor_files import Below

        table = Table(run.config.table)
        table.load_state_dict(dict(Below(run.weights, "table.")))
        return BigramCheckpoint(table.to(device), run.tokenizer, dict(run.training))

    def shrink(self, config: BigramRunConfig, num_steps: int) -> dict[str, Any]:
        return {"table": dataclasses.replace(config.table, rank=2)}

    def describe(self, config: BigramRunConfig) -> str:
        return f"bigrams of rank {config.table.rank}"

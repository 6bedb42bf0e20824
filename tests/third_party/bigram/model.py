"""The table itself: what trains it, samples from it, and is written of it."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bigram.family import TableConfig
from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.batch import Batch
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.files import atomic_folder
from cola_train.flops.work import NO_BACKWARD, Backward, Extent, Linear, Parts, product
from cola_train.likelihood.rows import Draw, ScoredRow
from cola_train.models.vocabulary_head import VocabularyHead, token_nats
from cola_train.objectives.objective import Objective, Term
from cola_train.randomness import Purpose, uniform
from cola_train.sampling.stream import GeneratedPart, Noise, Text, stream
from cola_train.sampling.token_choice import choose_tokens
from cola_train.tensor_files import Below, write_tensors


class Table(nn.Module):
    def __init__(self, config: TableConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.rank)
        self.head = VocabularyHead(config.rank, config.vocab_size, bias=False)


def table_pass(config: TableConfig, positions: int, backward: Backward) -> Parts:
    """A look-up is no multiplication: the head is all."""
    return {
        "table.head": product(
            Linear(config.rank, config.vocab_size), Extent.of(positions), backward
        )
    }


class BigramObjective(Objective):
    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"pairs": batch.loss_mask[:, 1:].sum()}

    def forward(self, batch: Batch, step: int | None = None) -> list[Term]:
        hidden = self.table.embedding(batch.tokens[:, :-1]).float()
        nats, right = self.table.head.losses(
            hidden, batch.tokens[:, 1:], batch.loss_mask[:, 1:].float()
        )
        return [
            Term("bigram", "nats_per_token", nats, "pairs", 1.0),
            Term("bigram_accuracy", "", right, "pairs"),
        ]


class BigramGeneration:
    def __init__(
        self,
        table: Table,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        start: int,
    ) -> None:
        self.table, self.config, self.start = table, config, start
        self.last: list[int] = []
        self.addresses: list[int] = []
        self.done: list[int] = []
        self.admit(prompts, addresses)

    def next_parts(self) -> list[GeneratedPart]:
        hidden = self.table.embedding(torch.tensor(self.last))
        draws = None
        if self.config.temperature > 0:
            index, start = (
                torch.tensor(self.addresses),
                torch.tensor([4 * done for done in self.done]),
            )
            draws = uniform(self.config.seed, Purpose.SAMPLER_TOKEN, index, 1, start)
        self.last = choose_tokens(self.table.head(hidden)[:, None].float(), self.config, draws)[
            :, 0
        ].tolist()
        self.done = [done + 1 for done in self.done]
        return [GeneratedPart([token]) for token in self.last]

    def keep(self, rows: Sequence[int]) -> None:
        self.last, self.addresses, self.done = (
            [values[row] for row in rows] for values in (self.last, self.addresses, self.done)
        )

    def admit(self, prompts: Sequence[Sequence[int]], prompt_indices: Sequence[int]) -> None:
        self.last += [([self.start, *prompt])[-1] for prompt in prompts]
        self.addresses += prompt_indices
        self.done += [0] * len(prompts)


class BigramLikelihood:
    num_draws = 1

    def __init__(self, table: Table, tokenizer: Tokenizer, rows: Sequence[ScoredRow]) -> None:
        self.table, self.tokenizer, self.rows = table, tokenizer, rows

    def width(self, row: int) -> int:
        return len(self.rows[row].tokens)

    def __call__(self, draws: Sequence[Draw]) -> Tensor:
        found = []
        for draw in draws:
            row = self.rows[draw.row]
            tokens = torch.tensor([self.tokenizer.eos_token_id, *row.tokens])
            nats = token_nats(
                self.table.head(self.table.embedding(tokens[:-1]))[None], tokens[None, 1:]
            )[0]
            scored = (tokens[1:] != self.tokenizer.pad_token_id) & (
                torch.arange(len(row.tokens)) >= row.given
            )
            found.append(-(nats.double() * scored).sum())
        return torch.stack(found)


@dataclasses.dataclass
class BigramCheckpoint(Checkpoint):
    table: Table
    tokenizer: Tokenizer
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | Path, *, replace: bool = False, max_shard_bytes: int = 0) -> None:
        weights = {f"table.{name}": value for name, value in self.table.state_dict().items()}
        write_table(
            Path(folder), self.table.config, weights, self.tokenizer, self.training, replace=replace
        )

    @property
    def family(self) -> str:
        return "bigram"

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"table": self.table}

    @property
    def vocab_size(self) -> int:
        return self.table.config.vocab_size

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        stops: frozenset[int],
        noise: Noise | None = None,
    ) -> Iterator[Text]:
        start = self.tokenizer.eos_token_id
        return stream(
            lambda some, indices: BigramGeneration(self.table, some, indices, config, start),
            prompts,
            addresses,
            config,
            stops,
        )

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        return 1, 1

    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        return table_pass(self.table.config, batch * config.max_new_tokens, NO_BACKWARD)

    @property
    def likelihood_kind(self) -> str:
        return "exact"

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        return "exact"

    def likelihood(self, rows: Sequence[ScoredRow], config: LikelihoodConfig) -> BigramLikelihood:
        return BigramLikelihood(self.table, self.tokenizer, rows)


def write_table(
    folder: Path,
    config: TableConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    training: Mapping[str, Any],
    *,
    replace: bool,
) -> None:
    shape = (config.vocab_size, config.rank)
    with atomic_folder(folder, replace=replace) as working:
        (working / "bigram.json").write_text(
            json.dumps({"table": dataclasses.asdict(config), "training": dict(training)})
        )
        shapes = {"embedding.weight": shape, "head.weight": shape}
        write_tensors(working, shapes, Below(weights, "table."), max_shard_bytes=10**9)
        tokenizer.save(working / "tokenizer.json")

"""The autoregressive model in memory, and what it can be asked."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.autoregressive.sampler import AutoregressiveGeneration, generation_work
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.families.transformer.format import Kind
from cola_train.flops.work import Parts
from cola_train.likelihood.rows import Draw, ScoredRow
from cola_train.models.transformer import Transformer
from cola_train.models.vocabulary_head import row_nats
from cola_train.sampling.stream import Noise, Text, stream


class NextTokenLikelihood:
    """log p(x) of the autoregressive model, exact: the sum over tokens of log p(x_i | x_<i).

    A row, and with documents apart each of its documents, begins after the end-of-text token, as
    sampling begins it: so its first token is scored too, and the same tokens as with other
    families. `rows` are not empty.
    """

    num_draws = 1

    def __init__(
        self, transformer: Transformer, tokenizer: Tokenizer, rows: Sequence[ScoredRow]
    ) -> None:
        self.transformer = transformer
        self.rows = rows
        self.sequences = [
            _after_separators(row, tokenizer.eos_token_id, tokenizer.pad_token_id) for row in rows
        ]

    def width(self, row: int) -> int:
        return len(self.sequences[row])

    def __call__(self, draws: Sequence[Draw]) -> Float64[Tensor, " draws"]:
        """log p of rows of one width, nats."""
        device = self.transformer.lm_head.weight.device
        # (draws, width, 3)
        places = torch.tensor([self.sequences[draw.row] for draw in draws], device=device)
        tokens, document, scored = places.unbind(-1)
        apart = any(self.rows[draw.row].documents is not None for draw in draws)
        hidden = self.transformer(tokens, document if apart else None)
        nats = row_nats(self.transformer.head, hidden[:, :-1], tokens[:, 1:])
        return -(nats * scored[:, 1:]).sum(1)


def _after_separators(row: ScoredRow, eos: int, pad: int) -> list[tuple[int, int, bool]]:
    """Each place of the row as the network reads it: token, document, whether it is scored."""
    documents = row.documents or [0] * len(row.tokens)
    places: list[tuple[int, int, bool]] = []
    for number, (token, document) in enumerate(zip(row.tokens, documents, strict=True)):
        if not places or document != places[-1][1]:
            places.append((eos, document, False))
        places.append((token, document, number >= row.given and token != pad))
    return places


@dataclasses.dataclass
class AutoregressiveCheckpoint(TransformerCheckpoint):
    """A causal transformer."""

    family = "ar"
    kind = Kind("llama", "LlamaForCausalLM", causal=True)
    likelihood_kind = "exact"

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        stops: frozenset[int],
        noise: Noise | None = None,
    ) -> Iterator[Text]:
        transformer, eos = self.for_passes(self.transformer, config), self.tokenizer.eos_token_id
        longest = max(map(len, prompts), default=0)
        return stream(
            lambda some, indices: AutoregressiveGeneration(
                transformer, some, indices, config, eos, longest
            ),
            prompts,
            addresses,
            config,
            stops,
        )

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        return 1, 1

    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        return generation_work(self.transformer.config, config, prompt_tokens, batch)

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        return "exact"

    def likelihood(
        self, rows: Sequence[ScoredRow], config: LikelihoodConfig
    ) -> NextTokenLikelihood:
        return NextTokenLikelihood(self.transformer, self.tokenizer, rows)

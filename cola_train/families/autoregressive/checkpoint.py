"""The autoregressive model in memory, and what it can be asked."""

import dataclasses
from collections.abc import Iterator, Sequence

from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.families.autoregressive.likelihood import NextTokenLikelihood
from cola_train.families.autoregressive.sampler import AutoregressiveGeneration, generation_work
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.families.transformer.format import Kind
from cola_train.flops.work import Parts
from cola_train.likelihood.rows import LikelihoodKind, ScoredRow
from cola_train.sampling.stream import Noise, Text, stream


@dataclasses.dataclass
class AutoregressiveCheckpoint(TransformerCheckpoint):
    """A causal transformer."""

    kind = Kind("ar", "llama", "LlamaForCausalLM", causal=True)

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

    @property
    def likelihood_kind(self) -> LikelihoodKind:
        return "exact"

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        return "exact"

    def likelihood(
        self, rows: Sequence[ScoredRow], config: LikelihoodConfig
    ) -> NextTokenLikelihood:
        return NextTokenLikelihood(self.transformer, self.tokenizer, rows)

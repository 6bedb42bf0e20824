"""The masked diffusion model in memory, and what it can be asked."""

import dataclasses
from collections.abc import Iterator, Sequence

from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.families.masked_diffusion.likelihood import MaskedDiffusionBound
from cola_train.families.masked_diffusion.sampler import generate_masked, generation_work
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.families.transformer.format import Kind
from cola_train.flops.work import Parts
from cola_train.likelihood.rows import LikelihoodKind, ScoredRow
from cola_train.sampling.stream import Noise, Text


@dataclasses.dataclass
class MaskedDiffusionCheckpoint(TransformerCheckpoint):
    """A transformer that sees the whole row."""

    kind = Kind("llada", "cola_llada", "ColaLLaDAModel", causal=False)

    def texts(
        self,
        prompts: Sequence[Sequence[int]],
        addresses: Sequence[int],
        config: SamplerConfig,
        stops: frozenset[int],
        noise: Noise | None = None,
    ) -> Iterator[Text]:
        # Rows of a batch end together, so none makes room for another.
        transformer = self.for_passes(self.transformer, config)
        # After nothing, all positions would look the same and none be the most confident one.
        ids = [list(prompt) or [self.tokenizer.eos_token_id] for prompt in prompts]
        for start in range(0, len(ids), config.batch_size):
            places = range(start, min(start + config.batch_size, len(ids)))
            some, indices = [ids[place] for place in places], [addresses[place] for place in places]
            batch = generate_masked(transformer, some, indices, config)
            yield from map(Text, places, batch.tolist())

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        return new_tokens, new_tokens

    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        return generation_work(self.transformer.config, config, prompt_tokens, batch)

    @property
    def likelihood_kind(self) -> LikelihoodKind:
        return "bound"

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        return f"an upper bound, by {config.num_samples} draws of the mask for each row"

    def likelihood(
        self, rows: Sequence[ScoredRow], config: LikelihoodConfig
    ) -> MaskedDiffusionBound:
        return MaskedDiffusionBound(self.transformer, self.tokenizer, rows, config)

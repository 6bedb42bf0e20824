"""The autoregressive model in memory, and what it can be asked."""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.transformer.checkpoint import Kind, TransformerCheckpoint
from cola_train.families.transformer.family import transformer_pass
from cola_train.flops.passes import Span, added, named, row_pairs
from cola_train.flops.work import NO_BACKWARD, Extent, Parts
from cola_train.likelihood.rows import Draw, ScoredRow
from cola_train.models.attention.cached import CachedAttention, KVCache
from cola_train.models.attention.masks import clean_layout, visible_set_mask
from cola_train.models.transformer import Transformer
from cola_train.models.vocabulary_head import row_nats
from cola_train.randomness import Purpose, uniform
from cola_train.sampling.stream import GeneratedPart, Noise, Text, stream
from cola_train.sampling.token_choice import choose_tokens, penalize_repetition


class AutoregressiveGeneration:
    """Prompts of any lengths in a batch, each as if alone; rows may end and others begin."""

    def __init__(
        self,
        transformer: Transformer,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        config: SamplerConfig,
        start_token_id: int,
        longest_prompt: int | None = None,
    ) -> None:
        """Run the network over the first prompts.

        An empty prompt begins after `start_token_id`, as a document does. `prompt_indices` address
        the random draws. `longest_prompt`: tokens of the longest that there will be, if not here.
        """
        self.transformer, self.config, self.start_token_id = transformer, config, start_token_id
        self.device = transformer.lm_head.weight.device
        width = max(1, longest_prompt or max(map(len, prompts)))
        self.cache = transformer.new_cache(len(prompts), width + config.max_new_tokens)
        self.prompt_indices, self.tokens_done = list(prompt_indices), [0] * len(prompts)
        self.seen = torch.zeros(
            len(prompts), transformer.config.vocab_size, dtype=torch.bool, device=self.device
        )
        self.last = self._read(prompts, self.cache)
        # the last tokens, which go through the network if others follow
        self._pending: Tensor | None = None

    def keep(self, rows: Sequence[int]) -> None:
        """Give up all rows but these, which move up in their order; `rows` increases."""
        rows = list(rows)
        self.cache.keep(rows)
        self.prompt_indices = [self.prompt_indices[row] for row in rows]
        self.tokens_done = [self.tokens_done[row] for row in rows]
        self.seen, self.last = self.seen[rows], self.last[rows]
        self._pending = self._pending[rows] if self._pending is not None and rows else None

    def admit(self, prompts: Sequence[Sequence[int]], prompt_indices: Sequence[int]) -> None:
        """Add prompts behind the rows in use, of which there are never more than at first."""
        self._pass_pending()
        cache = self.transformer.new_cache(len(prompts), max(1, *map(len, prompts)))
        self.last = torch.cat([self.last, self._read(prompts, cache)])
        self.cache.append(cache)
        self.prompt_indices += prompt_indices
        self.tokens_done += [0] * len(prompts)
        self.seen = torch.cat([self.seen, self.seen.new_zeros(len(prompts), self.seen.shape[1])])

    def _read(self, prompts: Sequence[Sequence[int]], cache: KVCache) -> Float[Tensor, "batch dim"]:
        """Fill an empty cache; return the state after each prompt's last token."""
        begun = [list(prompt) or [self.start_token_id] for prompt in prompts]
        lengths = [len(prompt) for prompt in begun]
        # What fills short prompts comes after their last token, which does not see it; it is not
        # committed to the cache.
        tokens = pad_sequence([torch.tensor(prompt) for prompt in begun], batch_first=True)
        hidden = self._pass(tokens.to(self.device), cache, lengths)
        last = torch.tensor(lengths, device=self.device) - 1
        return hidden[torch.arange(len(prompts), device=self.device), last]

    def _pass(
        self, tokens: Int[Tensor, "batch seq"], cache: KVCache, added: Sequence[int]
    ) -> Float[Tensor, "batch seq dim"]:
        places = clean_layout(tokens.shape[1], 1, device=self.device)
        visible = 1 if tokens.shape[1] == 1 else visible_set_mask(places, places)[0]
        attention = CachedAttention(cache, visible)
        hidden: Tensor = self.transformer(tokens, positions=attention.slots, attention=attention)
        cache.commit(added)
        return hidden

    def _pass_pending(self) -> None:
        if self._pending is not None:
            self.last = self._pass(self._pending, self.cache, [1] * len(self._pending))[:, 0]
            self._pending = None

    def next_token(self) -> Int[Tensor, " batch"]:
        """One more token of every row. The repetition penalty is on the ids generated so far."""
        self._pass_pending()
        logits = self.transformer.head(self.last).float()[:, None]
        penalized = penalize_repetition(logits, self.seen, self.config.repetition_penalty)
        token = choose_tokens(penalized, self.config, self._draws())
        self.seen.scatter_(1, token, True)
        self.tokens_done = [done + 1 for done in self.tokens_done]
        self._pending = token
        return token[:, 0]

    def next_parts(self) -> list[GeneratedPart]:
        """`next_token`, by row."""
        return [GeneratedPart([token]) for token in self.next_token().tolist()]

    def _draws(self) -> Float[Tensor, "batch 1"] | None:
        if self.config.temperature == 0:
            return None
        index, done = torch.tensor([self.prompt_indices, self.tokens_done], device=self.device)
        place = done % 4  # draws are addressed in fours
        four = uniform(self.config.seed, Purpose.SAMPLER_TOKEN, index, 4, done - place)
        return four.gather(1, place[:, None])


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
        self.refuse_others_settings(config)
        transformer, eos = self.for_passes(self.transformer, config), self.tokenizer.eos_token_id
        if self.training.get("mask_documents"):
            # Training and likelihood read every document behind a separator.
            prompts = [[eos, *prompt] for prompt in prompts]
        longest = max(map(len, prompts), default=0)

        def begin(some: Sequence[Sequence[int]], at: Sequence[int]) -> AutoregressiveGeneration:
            return AutoregressiveGeneration(transformer, some, at, config, eos, longest)

        return stream(begin, prompts, addresses, config, stops)

    def tokens_a_pass(self, prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
        return 1, 1

    def generation_work(self, config: SamplerConfig, prompt_tokens: int, batch: int) -> Parts:
        """FLOPs: a pass over the prompt, whose last state is read, and one a token but the last."""
        network = self.transformer.config
        # An empty prompt begins with the token that a document begins with.
        prompt = max(1, prompt_tokens)
        visible = row_pairs(prompt, 1)
        filling = Span(
            positions=Extent.of(prompt) * batch,
            pairs=visible * batch,
            outputs=Extent(1, prompt) * batch,
            output_pairs=Extent(prompt, visible.executed) * batch,
        )
        # Token k of those that are fed back sees the prompt and k tokens, itself included.
        fed_back = config.max_new_tokens - 1
        pairs = fed_back * prompt + fed_back * (fed_back + 1) // 2
        following = Span.all_read(fed_back * batch, Extent.of(pairs) * batch)
        passes = added(
            transformer_pass(network, filling, Extent.of(batch), NO_BACKWARD),
            transformer_pass(network, following, Extent.of(fed_back * batch), NO_BACKWARD),
        )
        return named("transformer", passes)

    def describe_likelihood(self, config: LikelihoodConfig) -> str:
        return "exact"

    def likelihood(
        self, rows: Sequence[ScoredRow], config: LikelihoodConfig
    ) -> NextTokenLikelihood:
        return NextTokenLikelihood(self.transformer, self.tokenizer, rows)

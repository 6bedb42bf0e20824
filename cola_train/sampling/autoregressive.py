"""The AR baseline's generation: one token of every row at a time, over a cache of keys and values."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.models.attention import CachedAttention
from cola_train.models.masks import clean_places, visible_set_mask
from cola_train.models.transformer import Transformer
from cola_train.randomness import Purpose, uniform
from cola_train.sampling.token_choice import choose_tokens, penalise_repetition


class AutoregressiveGeneration:
    """Prompts of any lengths, generated together; every row gets what it would get alone."""

    def __init__(
        self,
        transformer: Transformer,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        config: SamplerConfig,
        start_token_id: int,
    ) -> None:
        """`prompt_indices` address the random draws; an empty prompt begins after `start_token_id`, as a document does."""
        self.transformer, self.config = transformer, config
        self.device = transformer.lm_head.weight.device
        self.prompt_indices = torch.tensor(list(prompt_indices), device=self.device)
        prompts = [list(prompt) or [start_token_id] for prompt in prompts]
        width = max(len(prompt) for prompt in prompts)
        self.cache = transformer.new_cache(len(prompts), width + config.max_new_tokens)
        self.seen = torch.zeros(len(prompts), transformer.config.vocab_size, dtype=torch.bool, device=self.device)
        self.tokens_done = 0
        tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        # What fills short prompts comes after their last token, which does not see it; it is not committed to the cache.
        hidden = self._pass(tokens, lengths.tolist())
        self.last = hidden[torch.arange(len(prompts), device=self.device), lengths - 1]

    def _pass(self, tokens: Int[Tensor, "batch seq"], added: Sequence[int]) -> Tensor:
        places = clean_places(tokens.shape[1], 1, device=self.device)
        attention = CachedAttention(self.cache, visible_set_mask(places, places)[0])
        hidden: Tensor = self.transformer(tokens, positions=attention.slots, attention=attention)
        self.cache.commit(added)
        return hidden

    def next_token(self) -> Int[Tensor, " batch"]:
        """One more token of every row. The repetition penalty is on the ids generated so far."""
        logits = self.transformer.head(self.last).float()[:, None]
        penalised = penalise_repetition(logits, self.seen, self.config.repetition_penalty)
        token = choose_tokens(penalised, self.config, self._draws())
        self.seen.scatter_(1, token, True)
        self.tokens_done += 1
        if self.tokens_done < self.config.max_new_tokens:
            self.last = self._pass(token, [1] * len(token))[:, 0]
        return token[:, 0]

    def _draws(self) -> Tensor | None:
        if self.config.temperature == 0:
            return None
        # Draws are addressed in fours.
        first, place = divmod(self.tokens_done, 4)
        return uniform(self.config.seed, Purpose.SAMPLER_TOKEN, self.prompt_indices, 4, 4 * first)[:, place : place + 1]

"""Continuous batching: a finished text makes room for the next prompt; results keep the order."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError

# (prompt_index, block_index) -> a block's initial noise
Noise = Callable[[int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class GeneratedPart:
    """What one pass adds to one text: new ids, and for Cola DLM the latents of their block."""

    tokens: list[int]
    latents: Tensor | None = None


class Generation(Protocol):
    """Texts in flight, one a row."""

    def next_parts(self) -> list[GeneratedPart]:
        """Continue every row."""

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, moved up in their order."""

    def admit(self, prompts: Sequence[Sequence[int]], prompt_indices: Sequence[int]) -> None:
        """Start further prompts in rows behind those in use."""


@dataclasses.dataclass
class Text:
    """What has been generated after one prompt."""

    place: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    latents: list[Tensor] = dataclasses.field(default_factory=list)

    def ended(self, config: SamplerConfig, stops: frozenset[int]) -> bool:
        """Whether the text has a stop token or its maximal length."""
        return len(self.tokens) >= config.max_new_tokens or not stops.isdisjoint(self.tokens)


def stream(
    begin: Callable[[Sequence[Sequence[int]], Sequence[int]], Generation],
    prompts: Sequence[Sequence[int]],
    prompt_indices: Sequence[int],
    config: SamplerConfig,
    stops: frozenset[int],
) -> Iterator[Text]:
    """The texts of all prompts in their order, each as soon as it and the earlier ones have ended.

    `begin` starts a generation of prompts and the addresses of their draws; it is called once, with
    at most `config.batch_size` prompts, and a text that ends makes room for a waiting prompt.
    """
    waiting = collections.deque(range(len(prompts)))
    in_flight: list[Text] = []
    ended: dict[int, Text] = {}
    generation: Generation | None = None
    given = 0
    while waiting or in_flight:
        room = min(config.batch_size - len(in_flight), len(waiting))
        fresh = [waiting.popleft() for _ in range(room)]
        if fresh:
            chosen = [prompts[place] for place in fresh], [prompt_indices[place] for place in fresh]
            if generation is None:
                generation = begin(*chosen)
            else:
                generation.admit(*chosen)
            in_flight += [Text(place) for place in fresh]
        assert generation is not None
        for text, part in zip(in_flight, generation.next_parts(), strict=True):
            text.tokens += part.tokens
            if part.latents is not None:
                text.latents.append(part.latents)
        going = [row for row, text in enumerate(in_flight) if not text.ended(config, stops)]
        if len(going) < len(in_flight):
            ended |= {text.place: text for row, text in enumerate(in_flight) if row not in going}
            in_flight = [in_flight[row] for row in going]
            generation.keep(going)
        while given in ended:
            yield ended.pop(given)
            given += 1


def check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    """Refuse ids outside the vocabulary with a UserError; `what` names whose ids they are."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            where = f"{what}: id {token} at position {place}"
            raise UserError(f"{where} is outside the vocabulary, 0..{vocab_size - 1}.")

"""Text from a checkpoint: the public `generate`."""

import contextlib
import dataclasses
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError, require
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.sampling.precision import computes_in_bf16
from cola_train.sampling.stream import Noise, check_ids


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What was generated after one prompt.

    Attributes:
        text: the generated text alone, without the prompt and without the token that ended it.
        token_ids: its ids, max_new_tokens at most.
        prompt_ids: the prompt's ids.
        latents: (generated positions, latent_dim), clean, normalized, without the prompt's own;
            None of a baseline.
        finish_reason: "stop" at one of eos_token_ids, "length" at max_new_tokens.
        decoded_ids: token_ids with the one that ended the text and, but for the AR baseline, what
            its block holds after that one.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    latents: Float[Tensor, "generated channels"] | None
    finish_reason: Literal["stop", "length"]
    decoded_ids: list[int]


@torch.inference_mode()
def generate(
    checkpoint: Checkpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
    prompt_indices: Sequence[int] | None = None,
    warn_if_long: bool = True,
) -> list[GenerationResult]:
    """Continue each prompt (text, or token ids; empty generates from nothing).

    Args:
        checkpoint: one that writes text: of Cola DLM with its DiT, or of a baseline.
        prompts: any number, of any lengths; `config.batch_size` of them run together.
        config: the sampler's settings; defaults when absent.
        noise: for Cola DLM, initial noise of (prompt_index, block_index) as (block_size,
            latent_dim), in place of the seeded draws.
        prompt_indices: addresses of prompts' random draws, in [0, 2^63); 0, 1, ... when absent.
        warn_if_long: whether to warn of texts that are longer than the rows of training.

    Returns:
        One result per prompt, in order. The same seed gives the same result in any batch.

    Raises:
        UserError: a checkpoint without a DiT; one text in place of a list; a prompt that is neither
            a text nor ids; an id outside the vocabulary; logits that are not finite.
    """
    return list(generate_stream(checkpoint, prompts, config, noise, prompt_indices, warn_if_long))


@torch.inference_mode()
def generate_stream(
    checkpoint: Checkpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
    prompt_indices: Sequence[int] | None = None,
    warn_if_long: bool = True,
) -> Iterator[GenerationResult]:
    """`generate`, yielding each result as soon as it is there; a text that ends frees its row."""
    config = config or SamplerConfig()
    tokenizer, device = checkpoint.tokenizer, checkpoint.device
    stops = config.eos_token_ids
    if stops is None:
        ends = (tokenizer.eos_token_id, tokenizer.im_end_token_id)
        stops = tuple(token for token in ends if token is not None)
    require(
        not isinstance(prompts, str | bytes),
        'prompts must be a list of prompts, for example ["It was"], not one text.',
    )
    pad = () if config.pad_token_id is None else (config.pad_token_id,)
    check_ids(pad, checkpoint.vocab_size, "pad_token_id")
    ids = [
        _ids(prompt, f"prompt {index}", checkpoint.tokenizer)
        for index, prompt in enumerate(prompts)
    ]
    for index, prompt in enumerate(ids):
        check_ids(prompt, checkpoint.vocab_size, f"prompt {index}")
    addresses = range(len(ids)) if prompt_indices is None else prompt_indices
    texts = checkpoint.texts(ids, addresses, config, frozenset(stops), noise)
    longest = max((len(prompt) for prompt in ids), default=0) + config.max_new_tokens
    trained = checkpoint.trained_seq_len
    if warn_if_long and trained is not None and longest > trained:
        warnings.warn(
            f"A prompt and its continuation come to {longest} tokens; this model was trained on "
            f"rows of {trained} and has seen nothing longer. The text may fall apart; shorten the "
            "prompt or lower max_new_tokens.",
            stacklevel=3,
        )
    for prompt in ids:
        # Entered for each result: between two of them the caller's own code runs.
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(config, device)):
            text = next(texts)
        tokens = text.tokens[: config.max_new_tokens]
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        kept = tokens if end is None else tokens[:end]
        yield GenerationResult(
            text=tokenizer.decode(kept, after=prompt),
            token_ids=kept,
            prompt_ids=prompt,
            latents=checkpoint.latents_of(prompt, text, len(kept)),
            finish_reason="length" if end is None else "stop",
            decoded_ids=tokens,
        )


def _ids(prompt: str | Sequence[int], name: str, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not isinstance(prompt, bytes):
        with contextlib.suppress(TypeError):
            return [operator.index(token) for token in prompt]
    raise UserError(f"{name} must be a text or a list of token ids, not {repr(prompt)[:60]}.")

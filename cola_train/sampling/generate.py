"""Text from a checkpoint: the public `generate`."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import Checkpoint
from cola_train.sampling.blocks import BlockGeneration, Noise


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What one prompt became.

    Attributes:
        text: the generated text alone, without the prompt and without the token that ended it.
        token_ids: its ids, max_new_tokens at most.
        prompt_ids: the prompt's ids.
        latents: (generated positions, latent_dim), clean, normalised; the prompt's own latents are not among them.
        finish_reason: "stop" at one of eos_token_ids, "length" at max_new_tokens.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    latents: Float[Tensor, "generated channels"]
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    checkpoint: Checkpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
) -> list[GenerationResult]:
    """Continue each prompt (text, or token ids; empty generates from nothing).

    Args:
        checkpoint: VAE, DiT and tokenizer.
        prompts: any number, of any lengths; `config.batch_size` of them run together.
        config: the sampler's settings; its defaults when absent.
        noise: initial noise of (prompt_index, block_index) as (block_size, latent_dim), in place of the seeded draws.

    Returns:
        One result per prompt, in order. The same seed gives the same result in any batch.

    Raises:
        UserError: a checkpoint without a DiT, or a prompt id that the VAE does not have.
    """
    return list(generate_stream(checkpoint, prompts, config, noise))


@torch.inference_mode()
def generate_stream(
    checkpoint: Checkpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
) -> Iterator[GenerationResult]:
    """`generate`, giving each batch's results as soon as they are there."""
    config = config or SamplerConfig()
    if checkpoint.dit is None:
        raise UserError("This checkpoint holds a VAE only; sampling needs the DiT of stage 2 (cola-train joint).")
    tokenizer = checkpoint.tokenizer
    pad = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    stops = frozenset(_default_stops(tokenizer) if config.eos_token_ids is None else config.eos_token_ids)
    ids = [_prompt_ids(prompt, index, checkpoint) for index, prompt in enumerate(prompts)]
    _check_ids([pad], checkpoint.vae.config.vocab_size, "pad_token_id")
    _warn_if_long(ids, config, checkpoint.trained_seq_len)
    device = checkpoint.vae.decoder.in_layer.weight.device
    for start in range(0, len(ids), config.batch_size):
        rows = range(start, min(start + config.batch_size, len(ids)))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            generation = BlockGeneration(checkpoint.vae, checkpoint.dit, [ids[row] for row in rows], list(rows), config, pad, noise)
            yield from _run(generation, [ids[row] for row in rows], config, stops, tokenizer)


def _run(
    generation: BlockGeneration, ids: list[list[int]], config: SamplerConfig, stops: frozenset[int], tokenizer: Tokenizer
) -> list[GenerationResult]:
    latents, tokens = [], []
    finished = [False] * len(ids)
    while generation.blocks_done < generation.num_blocks and not all(finished):
        block = generation.next_block()
        latents.append(block.latents)
        tokens.append(block.tokens)
        so_far = torch.cat(tokens, dim=1).tolist()
        for row, prefix in enumerate(generation.prefixes):
            new = so_far[row][prefix.known_tokens :]
            finished[row] = len(new) >= config.max_new_tokens or not stops.isdisjoint(new)
    all_latents, all_tokens = torch.cat(latents, dim=1), torch.cat(tokens, dim=1).tolist()
    results = []
    for row, prefix in enumerate(generation.prefixes):
        new = all_tokens[row][prefix.known_tokens :][: config.max_new_tokens]
        end = next((place for place, token in enumerate(new) if token in stops), None)
        kept = new if end is None else new[:end]
        last_latent = -(-(prefix.known_tokens + len(kept)) // generation.patch_size)
        results.append(
            GenerationResult(
                text=tokenizer.decode(kept),
                token_ids=kept,
                prompt_ids=ids[row],
                latents=all_latents[row, prefix.known_latents : max(last_latent, prefix.known_latents)].cpu(),
                finish_reason="length" if end is None else "stop",
            )
        )
    return results


def _default_stops(tokenizer: Tokenizer) -> list[int]:
    return [token for token in (tokenizer.eos_token_id, tokenizer.im_end_token_id) if token is not None]


def _prompt_ids(prompt: str | Sequence[int], index: int, checkpoint: Checkpoint) -> list[int]:
    if isinstance(prompt, str):
        return checkpoint.tokenizer.encode(prompt)
    ids = [int(token) for token in prompt]
    _check_ids(ids, checkpoint.vae.config.vocab_size, f"prompt {index}")
    return ids


def _check_ids(ids: Sequence[int], vocab_size: int, what: str) -> None:
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise UserError(f"{what}: id {token} at position {place} is outside the vocabulary, 0..{vocab_size - 1}.")


def _warn_if_long(ids: Sequence[Sequence[int]], config: SamplerConfig, trained_seq_len: int | None) -> None:
    longest = max((len(prompt) for prompt in ids), default=0) + config.max_new_tokens
    if trained_seq_len is not None and longest > trained_seq_len:
        warnings.warn(
            f"A prompt and its continuation come to {longest} tokens; this model was trained on rows of {trained_seq_len} and has "
            "seen nothing longer. The text may fall apart; shorten the prompt or lower max_new_tokens.",
            stacklevel=4,
        )

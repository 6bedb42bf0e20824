"""Text from a checkpoint: the public `generate`."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cola_train.baseline_format import BaselineCheckpoint
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import Checkpoint
from cola_train.sampling.autoregressive import AutoregressiveGeneration
from cola_train.sampling.blocks import BlockGeneration, Noise, Prefix
from cola_train.sampling.masked_diffusion import generate_masked

AnyCheckpoint = Checkpoint | BaselineCheckpoint
Generated = tuple[list[int], Callable[[int], Tensor] | None]  # ids; and the latents of the first so many of them
Runner = Callable[[list[list[int]], Sequence[int]], list[Generated]]


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What one prompt became.

    Attributes:
        text: the generated text alone, without the prompt and without the token that ended it.
        token_ids: its ids, max_new_tokens at most.
        prompt_ids: the prompt's ids.
        latents: (generated positions, latent_dim), clean, normalised, without the prompt's own; None of a baseline.
        finish_reason: "stop" at one of eos_token_ids, "length" at max_new_tokens.
        decoded_ids: token_ids with the one that ended the text and, but for the AR baseline, what its block holds after that one.
    """

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    latents: Float[Tensor, "generated channels"] | None
    finish_reason: Literal["stop", "length"]
    decoded_ids: list[int]


@torch.inference_mode()
def generate(
    checkpoint: AnyCheckpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
    prompt_indices: Sequence[int] | None = None,
) -> list[GenerationResult]:
    """Continue each prompt (text, or token ids; empty generates from nothing).

    Args:
        checkpoint: of Cola DLM, with its DiT, or of a baseline.
        prompts: any number, of any lengths; `config.batch_size` of them run together.
        config: the sampler's settings; its defaults when absent.
        noise: for Cola DLM, initial noise of (prompt_index, block_index) as (block_size, latent_dim), in place of the seeded draws.
        prompt_indices: each prompt's address of its random draws, in [0, 2^63); 0, 1, 2, ... when absent.

    Returns:
        One result per prompt, in order. The same seed gives the same result in any batch.

    Raises:
        UserError: a checkpoint without a DiT, or a prompt id outside the vocabulary.
    """
    return list(generate_stream(checkpoint, prompts, config, noise, prompt_indices))


@torch.inference_mode()
def generate_stream(
    checkpoint: AnyCheckpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
    prompt_indices: Sequence[int] | None = None,
) -> Iterator[GenerationResult]:
    """`generate`, giving each batch's results as soon as they are there."""
    config = config or SamplerConfig()
    tokenizer, device = checkpoint.tokenizer, _device_of(checkpoint)
    stops = frozenset(_default_stops(tokenizer) if config.eos_token_ids is None else config.eos_token_ids)
    ids = [_prompt_ids(prompt, index, checkpoint) for index, prompt in enumerate(prompts)]
    addresses = range(len(ids)) if prompt_indices is None else prompt_indices
    run = _runner(checkpoint, config, stops, noise)
    _warn_if_long(ids, config, checkpoint.trained_seq_len)
    for start in range(0, len(ids), config.batch_size):
        rows = range(start, min(start + config.batch_size, len(ids)))
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            batch = run([ids[row] for row in rows], [addresses[row] for row in rows])
        for row, (tokens, latents) in zip(rows, batch, strict=True):
            end = _first_stop(tokens, stops)
            kept = tokens if end is None else tokens[:end]
            yield GenerationResult(
                text=tokenizer.decode(kept),
                token_ids=kept,
                prompt_ids=ids[row],
                latents=None if latents is None else latents(len(kept)),
                finish_reason="length" if end is None else "stop",
                decoded_ids=tokens,
            )


def _runner(checkpoint: AnyCheckpoint, config: SamplerConfig, stops: frozenset[int], noise: Noise | None) -> Runner:
    """What generates a batch: max_new_tokens ids a prompt, or fewer after a stop; the same in any batch."""
    if isinstance(checkpoint, Checkpoint):
        if checkpoint.dit is None:
            raise UserError("This checkpoint holds a VAE only; sampling needs the DiT of stage 2 (cola-train joint).")
        vae, dit = checkpoint.vae, checkpoint.dit
        pad = checkpoint.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        _check_ids([pad], vae.config.vocab_size, "pad_token_id")

        def run_blocks(prompts: list[list[int]], indices: Sequence[int]) -> list[Generated]:
            return _blocks(BlockGeneration(vae, dit, prompts, indices, config, pad, noise), config, stops)

        return run_blocks
    transformer, eos = checkpoint.transformer, checkpoint.tokenizer.eos_token_id

    def run_tokens(prompts: list[list[int]], indices: Sequence[int]) -> list[Generated]:
        if transformer.causal:
            rows = _one_by_one(AutoregressiveGeneration(transformer, prompts, indices, config, eos), config, stops)
        else:
            # After nothing, all positions would look the same and none be the most confident one.
            rows = generate_masked(transformer, [prompt or [eos] for prompt in prompts], indices, config).tolist()
        return [(row, None) for row in rows]

    return run_tokens


def _blocks(generation: BlockGeneration, config: SamplerConfig, stops: frozenset[int]) -> list[Generated]:
    latents, tokens = [], []
    finished = [False] * len(generation.prefixes)
    while generation.blocks_done < generation.num_blocks and not all(finished):
        block = generation.next_block()
        latents.append(block.latents)
        tokens.append(block.tokens)
        so_far = torch.cat(tokens, dim=1).tolist()
        for row, prefix in enumerate(generation.prefixes):
            new = so_far[row][prefix.known_tokens :]
            finished[row] = len(new) >= config.max_new_tokens or not stops.isdisjoint(new)
    all_latents, all_tokens = torch.cat(latents, dim=1), torch.cat(tokens, dim=1).tolist()

    def latents_of(row: int, prefix: Prefix, num_kept: int) -> Tensor:
        last = -(-(prefix.known_tokens + num_kept) // generation.patch_size)
        return all_latents[row, prefix.known_latents : max(last, prefix.known_latents)].cpu()

    block_tokens = generation.patch_size * generation.block_size

    def tokens_of(row: int, prefix: Prefix) -> list[int]:
        new = all_tokens[row][prefix.known_tokens :][: config.max_new_tokens]
        stop = _first_stop(new, stops)
        if stop is None:
            return new
        # Blocks after that of the stop are there only if another row needed them.
        num_blocks = (prefix.known_tokens + stop) // block_tokens + 1
        return new[: num_blocks * block_tokens - prefix.known_tokens]

    return [(tokens_of(row, prefix), functools.partial(latents_of, row, prefix)) for row, prefix in enumerate(generation.prefixes)]


def _first_stop(tokens: Sequence[int], stops: frozenset[int]) -> int | None:
    return next((place for place, token in enumerate(tokens) if token in stops), None)


def _one_by_one(generation: AutoregressiveGeneration, config: SamplerConfig, stops: frozenset[int]) -> list[list[int]]:
    tokens: list[Tensor] = []
    finished: set[int] = set()
    while len(tokens) < config.max_new_tokens and len(finished) < len(generation.prompt_indices):
        tokens.append(generation.next_token())
        finished |= {row for row, token in enumerate(tokens[-1].tolist()) if token in stops}
    rows: list[list[int]] = torch.stack(tokens, dim=1).tolist()
    ends = [_first_stop(row, stops) for row in rows]
    return [row if end is None else row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def _device_of(checkpoint: AnyCheckpoint) -> torch.device:
    network = checkpoint.vae if isinstance(checkpoint, Checkpoint) else checkpoint.transformer
    return next(network.parameters()).device


def _default_stops(tokenizer: Tokenizer) -> list[int]:
    return [token for token in (tokenizer.eos_token_id, tokenizer.im_end_token_id) if token is not None]


def _prompt_ids(prompt: str | Sequence[int], index: int, checkpoint: AnyCheckpoint) -> list[int]:
    if isinstance(prompt, str):
        return checkpoint.tokenizer.encode(prompt)
    ids = [int(token) for token in prompt]
    network = checkpoint.vae if isinstance(checkpoint, Checkpoint) else checkpoint.transformer
    _check_ids(ids, network.config.vocab_size, f"prompt {index}")
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

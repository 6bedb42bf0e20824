"""Text from a checkpoint: the public `generate`."""

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from cola_train.baseline_format import BaselineCheckpoint
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import Checkpoint
from cola_train.models.transformer import Transformer
from cola_train.sampling.autoregressive import AutoregressiveGeneration
from cola_train.sampling.blocks import BlockGeneration, Noise, Prefix
from cola_train.sampling.masked_diffusion import generate_masked
from cola_train.sampling.precision import computes_in_bf16, network_for_passes
from cola_train.sampling.stream import Text, stream

AnyCheckpoint = Checkpoint | BaselineCheckpoint


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
    *,
    warns: bool = True,
) -> list[GenerationResult]:
    """Continue each prompt (text, or token ids; empty generates from nothing).

    Args:
        checkpoint: of Cola DLM, with its DiT, or of a baseline.
        prompts: any number, of any lengths; `config.batch_size` of them run together.
        config: the sampler's settings; its defaults when absent.
        noise: for Cola DLM, initial noise of (prompt_index, block_index) as (block_size, latent_dim), in place of the seeded draws.
        prompt_indices: each prompt's address of its random draws, in [0, 2^63); 0, 1, 2, ... when absent.
        warns: whether to warn of texts that are longer than training saw; a caller with many batches does so once by itself.

    Returns:
        One result per prompt, in order. The same seed gives the same result in any batch.

    Raises:
        UserError: a checkpoint without a DiT, or a prompt id outside the vocabulary.
    """
    return list(generate_stream(checkpoint, prompts, config, noise, prompt_indices, warns=warns))


@torch.inference_mode()
def generate_stream(
    checkpoint: AnyCheckpoint,
    prompts: Sequence[str | Sequence[int]],
    config: SamplerConfig | None = None,
    noise: Noise | None = None,
    prompt_indices: Sequence[int] | None = None,
    *,
    warns: bool = True,
) -> Iterator[GenerationResult]:
    """`generate`, giving each result as soon as it and those before it are there; a text that ends makes room for the next."""
    config = config or SamplerConfig()
    tokenizer, device = checkpoint.tokenizer, _device_of(checkpoint)
    stops = frozenset(_default_stops(tokenizer) if config.eos_token_ids is None else config.eos_token_ids)
    ids = [_prompt_ids(prompt, index, checkpoint) for index, prompt in enumerate(prompts)]
    addresses = range(len(ids)) if prompt_indices is None else prompt_indices
    texts = _texts(checkpoint, ids, addresses, config, stops, noise)
    if warns:
        _warn_if_long(ids, config, checkpoint.trained_seq_len)
    for prompt in ids:
        # Entered for each result: between two of them the caller's own code runs.
        with torch.autocast(device.type, torch.bfloat16, enabled=computes_in_bf16(config, device)):
            text = next(texts)
        tokens = text.tokens[: config.max_new_tokens]
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        kept = tokens if end is None else tokens[:end]
        yield GenerationResult(
            text=tokenizer.decode(kept),
            token_ids=kept,
            prompt_ids=prompt,
            latents=_latents(checkpoint, prompt, text, len(kept)),
            finish_reason="length" if end is None else "stop",
            decoded_ids=tokens,
        )


def _texts(
    checkpoint: AnyCheckpoint,
    ids: list[list[int]],
    addresses: Sequence[int],
    config: SamplerConfig,
    stops: frozenset[int],
    noise: Noise | None,
) -> Iterator[Text]:
    """What follows each prompt: max_new_tokens ids and what their last block holds beyond, or fewer after a stop."""
    device = _device_of(checkpoint)
    if isinstance(checkpoint, Checkpoint):
        if checkpoint.dit is None:
            raise UserError("This checkpoint holds a VAE only; sampling needs the DiT of stage 2 (cola-train joint).")
        pad = checkpoint.tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
        _check_ids([pad], checkpoint.vae.config.vocab_size, "pad_token_id")
        vae = network_for_passes(checkpoint, checkpoint.vae, config, device)
        dit = network_for_passes(checkpoint, checkpoint.dit, config, device)
        size = vae.config.patch_size, dit.config.block_size
        prefixes = [Prefix.of(len(prompt), *size) for prompt in ids]
        capacity = max((prefix.history_blocks + prefix.num_blocks(config.max_new_tokens, *size) for prefix in prefixes), default=0)
        return stream(
            lambda prompts, indices: BlockGeneration(vae, dit, prompts, indices, config, pad, noise, capacity),
            ids, addresses, config, stops,
        )  # fmt: skip
    transformer, eos = network_for_passes(checkpoint, checkpoint.transformer, config, device), checkpoint.tokenizer.eos_token_id
    if transformer.causal:
        longest = max(map(len, ids), default=0)
        return stream(
            lambda prompts, indices: AutoregressiveGeneration(transformer, prompts, indices, config, eos, longest),
            ids, addresses, config, stops,
        )  # fmt: skip
    # After nothing, all positions would look the same and none be the most confident one.
    return _all_at_once(transformer, [prompt or [eos] for prompt in ids], addresses, config)


def _all_at_once(transformer: Transformer, ids: list[list[int]], addresses: Sequence[int], config: SamplerConfig) -> Iterator[Text]:
    """Masked diffusion: rows of a batch end together, so there is no room to give to others."""
    for start in range(0, len(ids), config.batch_size):
        places = range(start, min(start + config.batch_size, len(ids)))
        batch = generate_masked(transformer, [ids[place] for place in places], [addresses[place] for place in places], config)
        yield from (Text(place, tokens) for place, tokens in zip(places, batch.tolist(), strict=True))


def _latents(checkpoint: AnyCheckpoint, prompt: list[int], text: Text, num_kept: int) -> Tensor | None:
    if not isinstance(checkpoint, Checkpoint):
        return None
    assert checkpoint.dit is not None
    prefix = Prefix.of(len(prompt), checkpoint.vae.config.patch_size, checkpoint.dit.config.block_size)
    return torch.cat(text.latents)[: prefix.num_latents(num_kept, checkpoint.vae.config.patch_size)]


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

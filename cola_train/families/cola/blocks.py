"""A batch of prompts in flight: encode the prefix once, then transport and decode one block at a
time (method, section 6).

All state is in the object, none on the networks, so any number of generations can share a
checkpoint.
"""

import dataclasses
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.transport import BlockTransport
from cola_train.models.attention.cached import CachedAttention, KVCache
from cola_train.models.attention.masks import clean_layout, visible_set_mask
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose, normal, round_up_to_draws, uniform
from cola_train.sampling.stream import GeneratedPart, Noise
from cola_train.sampling.token_choice import choose_tokens, penalize_repetition


@dataclasses.dataclass(frozen=True)
class Prefix:
    """How a prompt of some length divides into history, known latents of the first block, and what
    is generated.

    A latent that holds any prompt token is known; whole blocks of known latents are history.
    """

    num_tokens: int
    history_blocks: int
    known_latents: int  # of the first generated block, pinned to their clean values
    known_tokens: int  # prompt tokens of the first generated block, cut from the output

    @classmethod
    def of(cls, num_tokens: int, patch_size: int, block_size: int) -> "Prefix":
        """The division for a prompt of `num_tokens`."""
        latents = -(-num_tokens // patch_size)
        history = latents // block_size
        # A half-filled latent that completes a block makes history whole: its second token is then
        # never returned.
        return cls(
            num_tokens,
            history,
            latents % block_size,
            max(0, num_tokens - history * block_size * patch_size),
        )

    def num_latents(self, num_new: int, patch_size: int) -> int:
        """Latents of the first `num_new` new tokens, without known ones."""
        return max(0, -(-(self.known_tokens + num_new) // patch_size) - self.known_latents)

    def num_blocks(self, max_new_tokens: int, patch_size: int, block_size: int) -> int:
        """Blocks to generate for that many new tokens."""
        return -(-(self.known_tokens + max_new_tokens) // (block_size * patch_size))


@dataclasses.dataclass(frozen=True)
class GeneratedBlock:
    """One block of every row; known positions of a first block are in it, as decoded."""

    latents: Float[Tensor, "batch block channels"]
    logits: Float[Tensor, "batch seq vocab"]  # before the repetition penalty
    tokens: Int[Tensor, "batch seq"]


@dataclasses.dataclass
class _Rows:
    """The state of each row beside the caches."""

    prompt_indices: list[int]
    prefixes: list[Prefix]
    blocks_done: list[int]
    seen: Bool[Tensor, "batch vocab"]
    known: Float[Tensor, "batch block channels"]
    pinned: Bool[Tensor, "batch block"]


class BlockGeneration:
    """Prompts of any lengths, generated together; every row gets what it would get alone.

    Rows may end and others begin between blocks, so that rows are at different blocks.
    """

    def __init__(
        self,
        vae: TextVAE,
        dit: BlockCausalDiT,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        config: SamplerConfig,
        pad_token_id: int,
        noise: Noise | None,
        capacity_blocks: int | None = None,
    ) -> None:
        """Read the first prompts.

        Args:
            vae: encodes prompts, and decodes.
            dit: transports.
            prompts: ids of each row's prompt.
            prompt_indices: address the random draws.
            config: the sampler's settings.
            pad_token_id: fills the last block of a prompt.
            noise: (prompt_index, block_index) to a block's initial noise, in place of the seeded
                draws.
            capacity_blocks: the most that any row will ever hold, history included; when None, room
                for `num_blocks` in each.
        """
        self.vae, self.dit, self.config, self.pad_token_id, self.noise = (
            vae,
            dit,
            config,
            pad_token_id,
            noise,
        )
        self.patch_size, self.block_size = vae.config.patch_size, dit.config.block_size
        self.device = dit.txt_in.proj.weight.device
        self.transport = BlockTransport(dit, config)
        prefixes = [self.prefix_of(prompt) for prompt in prompts]
        blocks = capacity_blocks or max(prefix.history_blocks for prefix in prefixes) + max(
            map(self.blocks_of, prefixes)
        )
        self.dit_cache = dit.new_cache(len(prompts), blocks * self.block_size)
        self.vae_cache = vae.new_cache(len(prompts), blocks * self.block_size)
        # the last block, which the DiT's cache gets if another one follows
        self._pending: Tensor | None = None
        self._rows = self._read(prompts, prompt_indices, self.dit_cache, self.vae_cache)

    @property
    def prefixes(self) -> list[Prefix]:
        """Of each row's prompt."""
        return self._rows.prefixes

    @property
    def num_blocks(self) -> int:
        """Blocks that the rows need at most, if none ends before max_new_tokens."""
        return max(map(self.blocks_of, self.prefixes))

    def prefix_of(self, prompt: Sequence[int]) -> Prefix:
        """How a prompt divides."""
        return Prefix.of(len(prompt), self.patch_size, self.block_size)

    def blocks_of(self, prefix: Prefix) -> int:
        """Blocks to generate after a prompt for max_new_tokens."""
        return prefix.num_blocks(self.config.max_new_tokens, self.patch_size, self.block_size)

    def keep(self, rows: Sequence[int]) -> None:
        """Give up all rows but these, which move up in their order; `rows` increases."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
        self.dit_cache.keep(rows)
        self.vae_cache.keep(rows)
        old = self._rows
        self._rows = _Rows(
            [old.prompt_indices[row] for row in rows],
            [old.prefixes[row] for row in rows],
            [old.blocks_done[row] for row in rows],
            *(tensor[index] for tensor in (old.seen, old.known, old.pinned)),
        )
        self._pending = self._pending[index] if self._pending is not None and rows else None

    def admit(self, prompts: Sequence[Sequence[int]], prompt_indices: Sequence[int]) -> None:
        """Further prompts in rows behind those in use; as many rows in all as there were at first,
        at most.
        """
        self.catch_up()
        history = (
            max(1, *(self.prefix_of(prompt).history_blocks for prompt in prompts)) * self.block_size
        )
        caches = (
            self.dit.new_cache(len(prompts), history),
            self.vae.new_cache(len(prompts), history),
        )
        old, new = self._rows, self._read(prompts, prompt_indices, *caches)
        self.dit_cache.append(caches[0])
        self.vae_cache.append(caches[1])
        self._rows = _Rows(
            [*old.prompt_indices, *new.prompt_indices],
            [*old.prefixes, *new.prefixes],
            [*old.blocks_done, *new.blocks_done],
            *(
                torch.cat(pair)
                for pair in (
                    (old.seen, new.seen),
                    (old.known, new.known),
                    (old.pinned, new.pinned),
                )
            ),
        )

    def next_block(self) -> GeneratedBlock:
        """Generate one more block of every row."""
        block, rows = self.trial(self.transport), self._rows
        self.vae_cache.commit([self.block_size] * len(rows.prefixes))
        rows.seen.scatter_(1, block.tokens, True)
        rows.blocks_done = [done + 1 for done in rows.blocks_done]
        rows.pinned = torch.zeros_like(rows.pinned)
        self._pending = block.latents
        return block

    def trial(self, transport: BlockTransport) -> GeneratedBlock:
        """What `next_block` would give with this transport; the generation stays where it is."""
        self.catch_up()
        rows = self._rows
        opens = any(
            prefix.known_latents and not done
            for prefix, done in zip(rows.prefixes, rows.blocks_done, strict=True)
        )
        z_1 = self._initial_noise(rows.known.shape[-1])
        z_0 = transport(z_1, rows.known, rows.pinned if opens else None, self.dit_cache)
        logits = self.vae.decoder.head(self._decode(z_0, self.vae_cache)).float()
        penalized = penalize_repetition(logits, rows.seen, self.config.repetition_penalty)
        return GeneratedBlock(
            z_0, logits, choose_tokens(penalized, self.config, self._token_draws(logits.shape[1]))
        )

    @property
    def generated(self) -> Bool[Tensor, "batch block"]:
        """Which latents of the next block are generated; the others are a prompt's."""
        return ~self._rows.pinned

    def next_parts(self) -> list[GeneratedPart]:
        """`next_block`, by row, without what belongs to a prompt."""
        opening = [
            (prefix.known_tokens, prefix.known_latents) if done == 0 else (0, 0)
            for prefix, done in zip(self._rows.prefixes, self._rows.blocks_done, strict=True)
        ]
        block = self.next_block()
        latents = block.latents.cpu()
        return [
            GeneratedPart(tokens[known_tokens:], latents[row, known_latents:])
            for row, (tokens, (known_tokens, known_latents)) in enumerate(
                zip(block.tokens.tolist(), opening, strict=True)
            )
        ]

    def catch_up(self) -> None:
        """Put the last block into the DiT's cache, which everything that goes on begins with."""
        if self._pending is not None:
            self.transport.fill(
                self._pending, self.dit_cache, [self.block_size] * len(self._pending)
            )
            self._pending = None

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        dit_cache: KVCache,
        vae_cache: KVCache,
    ) -> _Rows:
        """Fill empty caches with whole prompt blocks; find the first block's known latents and
        where they are.
        """
        prefixes = [self.prefix_of(prompt) for prompt in prompts]
        block_tokens = self.patch_size * self.block_size
        width = max(1, *(-(-len(prompt) // block_tokens) for prompt in prompts)) * block_tokens
        tokens = torch.tensor(
            [[*prompt, *[self.pad_token_id] * (width - len(prompt))] for prompt in prompts],
            device=self.device,
        )
        latents = self.vae.encode(tokens).mean
        history = [prefix.history_blocks * self.block_size for prefix in prefixes]
        if longest := max(history):
            self.transport.fill(latents[:, :longest], dit_cache, history)
            self._decode(latents[:, :longest], vae_cache)
            vae_cache.commit(history)
        place = torch.arange(self.block_size, device=self.device)
        # A prompt of whole blocks has no known latents left; the clamp only keeps the look-up
        # inside the row.
        at = (torch.tensor(history, device=self.device)[:, None] + place).clamp(
            max=latents.shape[1] - 1
        )
        known = latents.gather(1, at[..., None].expand(-1, -1, latents.shape[-1]))
        counts = torch.tensor([prefix.known_latents for prefix in prefixes], device=self.device)
        seen = torch.zeros(
            len(prompts), self.vae.config.vocab_size, dtype=torch.bool, device=self.device
        )
        return _Rows(
            list(prompt_indices),
            prefixes,
            [0] * len(prompts),
            seen,
            known,
            place < counts[:, None],
        )

    def _decode(
        self, z_0: Float[Tensor, "batch latents channels"], cache: KVCache
    ) -> Float[Tensor, "batch seq dim"]:
        places = clean_layout(z_0.shape[1], self.vae.config.block_size, device=self.device)
        attention = CachedAttention(cache, visible_set_mask(places, places)[0])
        hidden: Tensor = self.vae.decoder(z_0, positions=attention.slots, attention=attention)
        return hidden

    def _initial_noise(self, channels: int) -> Float[Tensor, "batch block channels"]:
        rows = self._rows
        if self.noise is None:
            count = self.block_size * channels
            index, starts = self._addresses(count)
            draws = normal(self.config.seed, Purpose.SAMPLER_NOISE, index, count, starts)
            return draws.unflatten(1, (self.block_size, channels))
        blocks = [
            self.noise(index, done)
            for index, done in zip(rows.prompt_indices, rows.blocks_done, strict=True)
        ]
        for block in blocks:
            if tuple(block.shape) != (self.block_size, channels):
                raise UserError(
                    f"noise must give ({self.block_size}, {channels}) per block, not "
                    f"{tuple(block.shape)}."
                )
        return torch.stack(blocks).to(self.device, torch.float32)

    def _token_draws(self, num_tokens: int) -> Float[Tensor, "batch seq"] | None:
        if self.config.temperature == 0:
            return None
        index, starts = self._addresses(num_tokens)
        return uniform(self.config.seed, Purpose.SAMPLER_TOKEN, index, num_tokens, starts)

    def _addresses(self, count: int) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Where each row's next `count` draws are: its prompt's index, and a start that is a
        multiple of 4.
        """
        starts = [done * round_up_to_draws(count) for done in self._rows.blocks_done]
        index, start = torch.tensor([self._rows.prompt_indices, starts], device=self.device)
        return index, start

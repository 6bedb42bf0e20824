"""Prompts in flight: prefixes are encoded once, then block after block is transported and decoded.

Method, section 6. All state is in the object, none on the networks: any number of generations can
share a checkpoint.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.families.cola.prefix import Prefix
from cola_train.families.cola.transport import Block, BlockTransport, clean_attention
from cola_train.models.attention.cached import KVCache
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import Posterior, TextVAE
from cola_train.randomness import Purpose, normal, round_up_to_draws, uniform
from cola_train.sampling.stream import GeneratedPart, Noise
from cola_train.sampling.token_choice import choose_tokens, penalize_repetition


@dataclasses.dataclass(frozen=True)
class GeneratedBlock:
    """One block of every row; known positions of a first block are in it, as decoded."""

    latents: Block
    logits: Float[Tensor, "batch seq vocab"]  # before the repetition penalty
    tokens: Int[Tensor, "batch seq"]


@dataclasses.dataclass
class _Row:
    """The generation after one prompt, beside what is in the caches."""

    index: int  # of the prompt: addresses its random draws
    prefix: Prefix
    seen: Bool[Tensor, " vocab"]  # tokens that the repetition penalty is for
    known: Float[Tensor, "block channels"]  # known latents of the first block, then anything
    opening: list[int]  # the prompt's tokens in the first block
    blocks_done: int = 0

    @property
    def known_latents(self) -> int:
        """Latents of the next block that are the prompt's."""
        return 0 if self.blocks_done else self.prefix.known_latents


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

        `prompt_indices` address the random draws, which `noise` takes the place of; `pad_token_id`
        fills the last block of a prompt. `capacity_blocks`: the most that any row will ever hold,
        history included; when None, room for `num_blocks` in each.
        """
        self.vae, self.dit, self.config = vae, dit, config
        self.pad_token_id, self.noise = pad_token_id, noise
        self.patch_size, self.block_size = vae.config.patch_size, dit.config.block_size
        self.device = dit.txt_in.proj.weight.device
        self.transport = BlockTransport(dit, config)
        prefixes = [self._prefix_of(prompt) for prompt in prompts]
        blocks = capacity_blocks or max(prefix.history_blocks for prefix in prefixes) + max(
            prefix.generated_blocks(config.max_new_tokens) for prefix in prefixes
        )
        self.dit_cache = dit.new_cache(len(prompts), blocks * self.block_size)
        self.vae_cache = vae.new_cache(len(prompts), blocks * self.block_size)
        self.encoder_cache = self._new_encoder_cache(len(prompts), blocks)
        # The last block, which caches get if another one follows: its latents, or its tokens if
        # these are encoded anew.
        self._pending: Tensor | None = None
        caches = self.dit_cache, self.vae_cache, self.encoder_cache
        self._rows = self._read(prompts, prompt_indices, *caches)

    @property
    def prefixes(self) -> list[Prefix]:
        """The division of each row's prompt."""
        return [row.prefix for row in self._rows]

    @property
    def num_blocks(self) -> int:
        """Blocks that the rows need at most, if none ends before max_new_tokens."""
        return max(prefix.generated_blocks(self.config.max_new_tokens) for prefix in self.prefixes)

    @property
    def generated(self) -> Bool[Tensor, "batch block"]:
        """Which latents of the next block are generated; the others are a prompt's."""
        counts = torch.tensor([row.known_latents for row in self._rows], device=self.device)
        return torch.arange(self.block_size, device=self.device) >= counts[:, None]

    def keep(self, rows: Sequence[int]) -> None:
        """Give up all rows but these, which move up in their order; `rows` increases."""
        self.dit_cache.keep(rows)
        self.vae_cache.keep(rows)
        if self.encoder_cache is not None:
            self.encoder_cache.keep(rows)
        self._rows = [self._rows[row] for row in rows]
        self._pending = self._pending[list(rows)] if self._pending is not None and rows else None

    def admit(self, prompts: Sequence[Sequence[int]], prompt_indices: Sequence[int]) -> None:
        """Read further prompts into rows behind those in use, of as many as there were at first."""
        self.catch_up()
        longest = max(1, *(self._prefix_of(prompt).history_blocks for prompt in prompts))
        dit_cache = self.dit.new_cache(len(prompts), longest * self.block_size)
        vae_cache = self.vae.new_cache(len(prompts), longest * self.block_size)
        # The encoder also reads the prompts' last blocks.
        encoder_cache = self._new_encoder_cache(len(prompts), longest + 1)
        self._rows += self._read(prompts, prompt_indices, dit_cache, vae_cache, encoder_cache)
        self.dit_cache.append(dit_cache)
        self.vae_cache.append(vae_cache)
        if self.encoder_cache is not None and encoder_cache is not None:
            self.encoder_cache.append(encoder_cache)

    def next_block(self) -> GeneratedBlock:
        """Generate one more block of every row."""
        block = self.trial(self.transport)
        if self.encoder_cache is None:
            self.vae_cache.commit([self.block_size] * len(self._rows))
            self._pending = block.latents
        else:
            self._pending = self._text_of(block)
        for row, tokens in zip(self._rows, block.tokens, strict=True):
            row.seen.scatter_(0, tokens, True)
            row.blocks_done += 1
        return block

    def trial(self, transport: BlockTransport) -> GeneratedBlock:
        """What `next_block` would give with this transport; the generation stays where it is."""
        self.catch_up()
        known = torch.stack([row.known for row in self._rows])
        pinned = ~self.generated if any(row.known_latents for row in self._rows) else None
        z_1 = self.config.noise_scale * self._initial_noise(known.shape[-1])
        z_0 = transport(z_1, known, pinned, self.dit_cache)
        logits = self.vae.decoder.head(self._decode(z_0, self.vae_cache)).float()
        seen = torch.stack([row.seen for row in self._rows])
        penalized = penalize_repetition(logits, seen, self.config.repetition_penalty)
        draws = None
        if self.config.temperature > 0:
            draws = self._draws(uniform, Purpose.SAMPLER_TOKEN, logits.shape[1])
        return GeneratedBlock(z_0, logits, choose_tokens(penalized, self.config, draws))

    def next_parts(self) -> list[GeneratedPart]:
        """`next_block`, by row, without what belongs to a prompt."""
        known = [
            (0 if row.blocks_done else row.prefix.known_tokens, row.known_latents)
            for row in self._rows
        ]
        block = self.next_block()
        return [
            GeneratedPart(tokens[known_tokens:], latents[known_latents:])
            for tokens, latents, (known_tokens, known_latents) in zip(
                block.tokens.tolist(), block.latents.cpu(), known, strict=True
            )
        ]

    def catch_up(self) -> None:
        """Put the last block into the caches, before anything that reads or extends them."""
        if self._pending is not None:
            latents, added = self._pending, [self.block_size] * len(self._pending)
            if self.encoder_cache is not None:
                latents = self._encode(latents, self.encoder_cache)
                self.encoder_cache.commit(added)
                self._decode(latents, self.vae_cache)
                self.vae_cache.commit(added)
            self.transport.fill(latents, self.dit_cache, added)
            self._pending = None

    def _prefix_of(self, prompt: Sequence[int]) -> Prefix:
        return Prefix(len(prompt), self.patch_size, self.block_size)

    def _read(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        dit_cache: KVCache,
        vae_cache: KVCache,
        encoder_cache: KVCache | None,
    ) -> list[_Row]:
        """Fill empty caches with whole prompt blocks; find the first block's known latents."""
        prefixes = [self._prefix_of(prompt) for prompt in prompts]
        block_tokens = self.patch_size * self.block_size
        width = max(1, *(-(-len(prompt) // block_tokens) for prompt in prompts)) * block_tokens
        tokens = torch.tensor(
            [[*prompt, *[self.pad_token_id] * (width - len(prompt))] for prompt in prompts],
            device=self.device,
        )
        latents = self._encode(tokens, encoder_cache)
        history = [prefix.history_blocks * self.block_size for prefix in prefixes]
        if longest := max(history):
            self.transport.fill(latents[:, :longest], dit_cache, history)
            self._decode(latents[:, :longest], vae_cache)
            vae_cache.commit(history)
        if encoder_cache is not None:
            encoder_cache.commit(history)
        # The block after a prompt of whole blocks may be none of the row's.
        blocks = F.pad(latents, (0, 0, 0, self.block_size)).unflatten(1, (-1, self.block_size))
        seen = torch.zeros(self.vae.config.vocab_size, dtype=torch.bool, device=self.device)
        return [
            _Row(
                index,
                prefix,
                seen.clone(),
                row[prefix.history_blocks],
                [*prompt[prefix.history_blocks * block_tokens :]],
            )
            for index, prompt, prefix, row in zip(
                prompt_indices, prompts, prefixes, blocks, strict=True
            )
        ]

    def _new_encoder_cache(self, rows: int, blocks: int) -> KVCache | None:
        """Room for `blocks` of DiT blocks in each row; None where no block is encoded anew."""
        if self.config.history == "generated":
            return None
        return self.vae.new_encoder_cache(rows, blocks * self.block_size)

    def _text_of(self, block: GeneratedBlock) -> Int[Tensor, "batch seq"]:
        """A block's tokens, where a prompt's are known these."""
        tokens = block.tokens.clone()
        for row, known in zip(self._rows, tokens, strict=True):
            if not row.blocks_done:
                given = torch.tensor(row.opening, dtype=tokens.dtype, device=self.device)
                known[: len(given)] = given
        return tokens

    def _encode(
        self, tokens: Int[Tensor, "batch seq"], cache: KVCache | None
    ) -> Float[Tensor, "batch latents channels"]:
        """Posterior means; after what the encoder's KV cache holds of each row, if there is one."""
        if cache is None:
            return self.vae.encode(tokens).mean
        vae = self.vae.config
        attention = clean_attention(cache, tokens.shape[1] // vae.patch_size, vae.block_size)
        posterior: Posterior = self.vae.encoder(
            tokens, positions=attention.slots, attention=attention
        )
        return posterior.mean

    def _decode(
        self, z_0: Float[Tensor, "batch latents channels"], cache: KVCache
    ) -> Float[Tensor, "batch seq dim"]:
        """The decoder's last hidden states, whose keys and values the cache then holds uncommitted.

        `cache` is the decoder's KV cache with the history of each row.
        """
        attention = clean_attention(cache, z_0.shape[1], self.vae.config.block_size)
        hidden: Tensor = self.vae.decoder(z_0, positions=attention.slots, attention=attention)
        return hidden

    def _initial_noise(self, channels: int) -> Block:
        shape = (self.block_size, channels)
        if self.noise is None:
            draws = self._draws(normal, Purpose.SAMPLER_NOISE, self.block_size * channels)
            return draws.unflatten(1, shape)
        blocks = [self.noise(row.index, row.blocks_done) for row in self._rows]
        for block in blocks:
            if tuple(block.shape) != shape:
                raise UserError(f"noise must give {shape} per block, not {tuple(block.shape)}.")
        return torch.stack(blocks).to(self.device, torch.float32)

    def _draws(
        self, draw: Callable[..., Tensor], purpose: Purpose, count: int
    ) -> Float[Tensor, "batch draws"]:
        """Each row's next `count` draws of this purpose; they start at a multiple of 4."""
        indices = [row.index for row in self._rows]
        starts = [row.blocks_done * round_up_to_draws(count) for row in self._rows]
        index, start = torch.tensor([indices, starts], device=self.device)
        return draw(self.config.seed, purpose, index, count, start)

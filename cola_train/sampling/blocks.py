"""A batch of prompts in flight: encode the prefix once, then transport and decode one block at a time (method, section 6).

All state is in the object, none on the networks, so any number of generations can share a checkpoint.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.flow import euler_step, guide, schedule
from cola_train.models.attention import CachedAttention
from cola_train.models.dit import DIT_TIME_SCALE, BlockCausalDiT, Times
from cola_train.models.masks import clean_places, visible_set_mask
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose, normal, uniform
from cola_train.sampling.token_choice import choose_tokens, penalise_repetition

Noise = Callable[[int, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Prefix:
    """How a prompt of some length divides into history, known latents of the first block, and what is generated.

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
        # A half-filled latent that completes a block makes history whole: its second token is then never returned.
        return cls(num_tokens, history, latents % block_size, max(0, num_tokens - history * block_size * patch_size))


@dataclasses.dataclass(frozen=True)
class GeneratedBlock:
    """One block of every row; known positions of a first block are in it, as decoded."""

    latents: Float[Tensor, "batch block channels"]
    logits: Float[Tensor, "batch seq vocab"]  # before the repetition penalty
    tokens: Int[Tensor, "batch seq"]


class BlockGeneration:
    """Prompts of any lengths, generated together; every row gets what it would get alone."""

    def __init__(
        self,
        vae: TextVAE,
        dit: BlockCausalDiT,
        prompts: Sequence[Sequence[int]],
        prompt_indices: Sequence[int],
        config: SamplerConfig,
        pad_token_id: int,
        noise: Noise | None,
    ) -> None:
        """`prompt_indices` address the random draws; `noise(prompt_index, block_index)` replaces the initial noise."""
        self.vae, self.dit, self.config, self.noise = vae, dit, config, noise
        self.patch_size, self.block_size = vae.config.patch_size, dit.config.block_size
        self.device = dit.txt_in.proj.weight.device
        self.prompt_indices = list(prompt_indices)
        self.prefixes = [Prefix.of(len(prompt), self.patch_size, self.block_size) for prompt in prompts]
        self.num_blocks = max(
            -(-(prefix.known_tokens + config.max_new_tokens) // (self.block_size * self.patch_size)) for prefix in self.prefixes
        )
        self.blocks_done = 0
        capacity = (max(prefix.history_blocks for prefix in self.prefixes) + self.num_blocks) * self.block_size
        self.dit_cache = dit.new_cache(len(prompts), capacity)
        self.vae_cache = vae.new_cache(len(prompts), capacity)
        self.seen = torch.zeros(len(prompts), vae.config.vocab_size, dtype=torch.bool, device=self.device)
        self.known, self.pinned = self._read_prefixes(prompts, pad_token_id)

    def _inside(self, num_latents: int, block_size: int) -> Bool[Tensor, "seq seq"]:
        places = clean_places(num_latents, block_size, device=self.device)
        return visible_set_mask(places, places)[0]

    def _read_prefixes(self, prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
        """Fill both caches with whole prompt blocks; return the first block's known latents and where they are."""
        block_tokens = self.patch_size * self.block_size
        width = max(1, *(-(-len(prompt) // block_tokens) for prompt in prompts)) * block_tokens
        tokens = torch.tensor([[*prompt, *[pad_token_id] * (width - len(prompt))] for prompt in prompts], device=self.device)
        latents = self.vae.encode(tokens).mean
        longest = max(prefix.history_blocks for prefix in self.prefixes) * self.block_size
        if longest:
            self._commit(latents[:, :longest], [prefix.history_blocks * self.block_size for prefix in self.prefixes])
        starts = torch.tensor([prefix.history_blocks * self.block_size for prefix in self.prefixes], device=self.device)
        place = torch.arange(self.block_size, device=self.device)
        # A prompt of whole blocks has no known latents left; the clamp only keeps the look-up inside the row.
        at = (starts[:, None] + place).clamp(max=latents.shape[1] - 1)
        known = latents.gather(1, at[..., None].expand(-1, -1, latents.shape[-1]))
        counts = torch.tensor([prefix.known_latents for prefix in self.prefixes], device=self.device)
        return known, place < counts[:, None]

    def _commit(self, latents: Float[Tensor, "batch seq channels"], added: Sequence[int]) -> None:
        """One clean pass through DiT (t = 0) and decoder, whose keys and values then stay in the caches."""
        self._velocity(latents, torch.zeros_like(latents[..., 0], dtype=torch.bool), t=0.0, guided=False)
        self.dit_cache.commit(added)
        self._decode(latents)
        self.vae_cache.commit(added)

    def _velocity(
        self, z: Float[Tensor, "batch seq channels"], pinned: Bool[Tensor, "batch seq"], t: float, guided: bool
    ) -> Tensor:
        """Velocity given the cached history; guided: that of both branches, conditional rows first."""
        times = torch.tensor([t, 0.0], device=self.device)
        if self.config.released_rounding:
            times = (DIT_TIME_SCALE * times).bfloat16().float() / DIT_TIME_SCALE
            z = z.bfloat16().float()
        attention = CachedAttention(self.dit_cache, self._inside(z.shape[1], self.block_size))
        index, positions = pinned.long(), attention.slots
        if guided:
            # RoPE is relative: the unconditional branch may keep the conditional one's positions.
            z, index, positions = (torch.cat([x, x]) for x in (z, index, positions))
        velocity: Tensor = self.dit(z, Times(times, index), positions, attention)
        return velocity

    def _transport(self, z_1: Float[Tensor, "batch block channels"]) -> Float[Tensor, "batch block channels"]:
        """From noise to a clean block by Euler steps, known latents pinned at every step (clean condition repaint)."""
        known, pinned = self.known, self.pinned
        scale = torch.tensor([self.config.guidance_scale if n else 1.0 for n in self.dit_cache.lengths], device=self.device)
        guided = bool((scale != 1.0).any())
        z = z_1
        for t, t_next in itertools.pairwise(schedule(self.config.num_steps)):
            z = torch.where(pinned[..., None], known, z)
            velocity = self._velocity(z, pinned, t, guided)
            if guided:
                conditional, unconditional = velocity.chunk(2)
                if self.config.released_rounding:
                    conditional, unconditional = conditional.bfloat16(), unconditional.bfloat16()
                velocity = guide(conditional, unconditional, scale[:, None, None].to(conditional.dtype)).float()
            z = euler_step(z, velocity, t, t_next)
        return torch.where(pinned[..., None], known, z)

    def _decode(self, z_0: Float[Tensor, "batch latents channels"]) -> Float[Tensor, "batch seq dim"]:
        attention = CachedAttention(self.vae_cache, self._inside(z_0.shape[1], self.vae.config.block_size))
        hidden: Tensor = self.vae.decoder(z_0, positions=attention.slots, attention=attention)
        return hidden

    def _initial_noise(self, channels: int) -> Float[Tensor, "batch block channels"]:
        if self.noise is None:
            index = torch.tensor(self.prompt_indices, device=self.device)
            count = self.block_size * channels
            start = self.blocks_done * (-(-count // 4) * 4)
            return normal(self.config.seed, Purpose.SAMPLER_NOISE, index, count, start).unflatten(1, (self.block_size, channels))
        blocks = [self.noise(index, self.blocks_done) for index in self.prompt_indices]
        for block in blocks:
            if tuple(block.shape) != (self.block_size, channels):
                raise UserError(f"noise must give ({self.block_size}, {channels}) per block, not {tuple(block.shape)}.")
        return torch.stack(blocks).to(self.device, torch.float32)

    def _token_draws(self, num_tokens: int) -> Float[Tensor, "batch seq"] | None:
        if self.config.temperature == 0:
            return None
        index = torch.tensor(self.prompt_indices, device=self.device)
        start = self.blocks_done * (-(-num_tokens // 4) * 4)
        return uniform(self.config.seed, Purpose.SAMPLER_TOKEN, index, num_tokens, start)

    def next_block(self) -> GeneratedBlock:
        """Generate one more block of every row."""
        assert self.blocks_done < self.num_blocks
        z_0 = self._transport(self._initial_noise(self.known.shape[-1]))
        logits = self.vae.decoder.head(self._decode(z_0)).float()
        penalised = penalise_repetition(logits, self.seen, self.config.repetition_penalty)
        tokens = choose_tokens(penalised, self.config, self._token_draws(logits.shape[1]))
        self.seen.scatter_(1, tokens, True)
        self.blocks_done += 1
        if self.blocks_done < self.num_blocks:
            self.vae_cache.commit([self.block_size] * len(self.prefixes))
            self._velocity(z_0, torch.zeros_like(self.pinned), t=0.0, guided=False)
            self.dit_cache.commit([self.block_size] * len(self.prefixes))
            self.pinned = torch.zeros_like(self.pinned)
        return GeneratedBlock(z_0, logits, tokens)

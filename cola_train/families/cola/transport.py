"""One block of every row from noise to data: the solver's steps, guidance, and pinned latents."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.flow import guide, integrate, rescale_guided
from cola_train.models.attention.cached import CachedAttention, KVCache
from cola_train.models.attention.masks import clean_layout, visible_set_mask
from cola_train.models.dit import DIT_TIME_SCALE, BlockCausalDiT
from cola_train.models.modulation import Times
from cola_train.solvers import time_grid

Block = Float[Tensor, "batch block channels"]
Pinned = Bool[Tensor, "batch block"]  # True at known latents, which stay as they are


def clean_attention(cache: KVCache, num_latents: int, block_size: int) -> CachedAttention:
    """Block-causal attention of `num_latents` clean latents over the cache and one another."""
    places = clean_layout(num_latents, block_size, device=cache.keys.device)
    return CachedAttention(cache, visible_set_mask(places, places)[0])


class BlockTransport:
    """The DiT as samplers use it, over a cache that holds the history of each row."""

    def __init__(self, dit: BlockCausalDiT, config: SamplerConfig) -> None:
        """What depends on time alone is computed here, for every time of the grid."""
        self.dit, self.config = dit, config
        self.device = dit.txt_in.proj.weight.device
        self.times = time_grid(config.num_steps)
        distinct = torch.tensor(self.times, device=self.device)
        if config.released_rounding:
            distinct = (DIT_TIME_SCALE * distinct).bfloat16().float() / DIT_TIME_SCALE
        index = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        modulations = dit.modulations(distinct)
        if config.released_rounding:
            modulations = modulations.rounded()
        self._times = Times(distinct, index, modulations)
        self._steps = torch.arange(len(distinct), device=self.device)[:, None, None]
        self._clean = config.num_steps  # the place of t = 0 in the time grid
        self.denoise: Callable[..., Tensor] = dit
        if config.compile:
            # On a GPU whole passes are then replayed as CUDA graphs.
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.denoise = torch.compile(dit, dynamic=False, mode=mode)

    def fill(
        self, latents: Float[Tensor, "batch seq channels"], cache: KVCache, added: list[int]
    ) -> None:
        """Commit keys and values of one clean pass: the first `added[row]` positions of each row.

        `cache` is the DiT's KV cache; the pass sees what each row has committed there before.
        """
        num_latents, block_size = latents.shape[1], self.dit.config.block_size
        attention = (
            CachedAttention(cache, block_size)
            if num_latents == block_size
            else clean_attention(cache, num_latents, block_size)
        )
        # Nobody reads what the last layer makes of its keys and values.
        self.dit(
            self.passed(latents), self.times_at(self._clean), attention.slots, attention, outputs=0
        )
        cache.commit(added)

    def __call__(self, z_1: Block, known: Block, pinned: Pinned | None, cache: KVCache) -> Block:
        """From noise to a clean block, over the history in `cache`, where nothing is committed.

        Before every pass `known` latents are put where `pinned`, with t = 0 (clean repaint);
        nothing is pinned where that is None.
        """
        rows = len(cache.lengths)
        if self.config.compile:
            # Rows that are not in use run along: a batch of another size would be compiled again.
            spare = cache.allocated_rows - rows
            pinned = torch.zeros_like(known[..., 0], dtype=torch.bool) if pinned is None else pinned
            z_1, known, pinned = (
                torch.cat([x, x.new_zeros(spare, *x.shape[1:])]) for x in (z_1, known, pinned)
            )
            for held in (cache.keys, cache.values):
                # A CUDA graph is only made of a pass that writes to tensors whose addresses stay.
                torch._dynamo.mark_static_address(held)
        flow = _GuidedFlow(self, known, pinned, cache)
        z_0 = integrate(flow.velocity, z_1, self.config.num_steps, self.config.solver)
        return flow.pin(z_0)[:rows]

    def passed(self, latents: Tensor) -> Tensor:
        """Latents as the DiT gets them: rounded to bf16 where the released code rounds."""
        return latents.bfloat16().float() if self.config.released_rounding else latents

    def times_at(self, step: int, pinned: Bool[Tensor, "batch seq"] | None = None) -> Times:
        """The time of a step of the grid at every position, but for t = 0 where `pinned`."""
        index = self._steps[step] if pinned is None else torch.where(pinned, self._clean, step)
        return dataclasses.replace(self._times, index=index)


class _GuidedFlow:
    """The velocity field of one block of every row, guided, with known latents pinned."""

    def __init__(
        self, transport: BlockTransport, known: Block, pinned: Pinned | None, cache: KVCache
    ) -> None:
        self.transport, self.config = transport, transport.config
        self.known, self.pinned = known, pinned
        self.attention = CachedAttention(cache, known.shape[1], fixed_shapes=self.config.compile)
        # Without history both branches are the same, and the conditional one is enough.
        self.has_history = any(cache.lengths)
        scales = [self.config.guidance_scale if length else 1.0 for length in cache.lengths]
        scales += [1.0] * (len(known) - len(scales))
        self.scale = torch.tensor(scales, device=known.device)[:, None, None]

    def pin(self, z: Block) -> Block:
        """z with known latents in their places."""
        return z if self.pinned is None else torch.where(self.pinned[..., None], self.known, z)

    def velocity(self, z: Block, step: int) -> Block:
        """The velocity at a step of the time grid, guided where the settings say so."""
        z = self.pin(z)
        config = self.config
        if not (self.has_history and config.guides_at(self.transport.times[step])):
            return self._branches(z, step, 1)
        conditional, unconditional = self._branches(z, step, 2).chunk(2)
        scale = self.scale
        if config.released_rounding:
            conditional, unconditional, scale = (
                x.bfloat16() for x in (conditional, unconditional, scale)
            )
        guided = guide(conditional, unconditional, scale).float()
        if config.guidance_rescale:
            everywhere = torch.ones_like(z[..., 0], dtype=torch.bool)
            counted = everywhere if self.pinned is None else ~self.pinned
            guided = rescale_guided(guided, conditional.float(), counted, config.guidance_rescale)
        return guided

    def _branches(self, z: Tensor, step: int, count: int) -> Tensor:
        """Velocities of the conditional branch, or of both, conditional rows first, in one pass."""
        transport = self.transport
        # RoPE is relative: the unconditional branch may keep the conditional one's positions.
        z, positions = (torch.cat([x] * count) for x in (transport.passed(z), self.attention.slots))
        pinned = None if self.pinned is None else torch.cat([self.pinned] * count)
        velocity: Tensor = transport.denoise(
            z, transport.times_at(step, pinned), positions, self.attention
        )
        # The memory of a CUDA graph's result is overwritten by the next pass.
        return velocity.clone() if self.config.compile else velocity

"""One block of every row from noise to data: the solver's steps, guidance, and what both need once
per time grid or block.
"""

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from cola_train.config.sampling import SamplerConfig
from cola_train.flow import guide, integrate, rescale_guided
from cola_train.models.attention.cached import CachedAttention, KVCache
from cola_train.models.attention.masks import clean_layout, visible_set_mask
from cola_train.models.dit import DIT_TIME_SCALE, BlockCausalDiT, Times
from cola_train.solvers import time_grid


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
        self._times = Times(
            distinct,
            torch.zeros(1, 1, dtype=torch.long, device=self.device),
            dit.modulations(distinct),
        )
        self._steps = torch.arange(len(distinct), device=self.device)[:, None, None]
        self.denoise = dit
        if config.compile:
            # On a GPU whole passes are then replayed as CUDA graphs.
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self.denoise = torch.compile(dit, dynamic=False, mode=mode)  # type: ignore[assignment]  # called like it

    @property
    def clean(self) -> int:
        """The place of t = 0 in the time grid."""
        return self.config.num_steps

    def fill(
        self, latents: Float[Tensor, "batch seq channels"], cache: KVCache, added: list[int]
    ) -> None:
        """One clean pass, whose keys and values then stay in the cache: of the first `added[row]`
        positions of each row.
        """
        num_latents, block_size = latents.shape[1], self.dit.config.block_size
        if num_latents == block_size:
            attention = CachedAttention(cache, block_size)
        else:
            places = clean_layout(num_latents, block_size, device=self.device)
            attention = CachedAttention(cache, visible_set_mask(places, places)[0])
        # Nobody reads what the last layer makes of its keys and values.
        self.dit(
            self.passed(latents), self.times_at(self.clean), attention.slots, attention, outputs=0
        )
        cache.commit(added)

    def __call__(
        self,
        z_1: Float[Tensor, "batch block channels"],
        known: Float[Tensor, "batch block channels"],
        pinned: Bool[Tensor, "batch block"] | None,
        cache: KVCache,
    ) -> Float[Tensor, "batch block channels"]:
        """From noise to a clean block; before every pass `known` latents are put where `pinned`,
        with t = 0 (clean repaint).

        Nothing is pinned where that is None.
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
                # Else a CUDA graph, which must find them where they were, would not be made of a
                # pass that writes them.
                torch._dynamo.mark_static_address(held)
        block = _Block(self, known, pinned, cache)
        return block.pin(integrate(block.velocity, z_1, self.config.num_steps, self.config.solver))[
            :rows
        ]

    def passed(self, latents: Tensor) -> Tensor:
        """Latents on their way into the DiT."""
        return latents.bfloat16().float() if self.config.released_rounding else latents

    def times_at(self, step: int, pinned: Bool[Tensor, "batch seq"] | None = None) -> Times:
        """The time of a step of the grid at every position, but for t = 0 where `pinned`."""
        index = self._steps[step] if pinned is None else torch.where(pinned, self.clean, step)
        return dataclasses.replace(self._times, index=index)


class _Block:
    """A block that is being transported: what is the same in all of its steps."""

    def __init__(
        self,
        transport: BlockTransport,
        known: Float[Tensor, "batch block channels"],
        pinned: Bool[Tensor, "batch block"] | None,
        cache: KVCache,
    ) -> None:
        self.transport, self.config, self.known, self.pinned = (
            transport,
            transport.config,
            known,
            pinned,
        )
        self.attention = CachedAttention(cache, known.shape[1], fixed_shapes=self.config.compile)
        # Without history both branches are the same, and the conditional one is enough.
        self.has_history = any(cache.lengths)
        scales = [self.config.guidance_scale if length else 1.0 for length in cache.lengths]
        scales += [1.0] * (len(known) - len(scales))
        self.scale = torch.tensor(scales, device=known.device)[:, None, None]

    def pin(
        self, z: Float[Tensor, "batch block channels"]
    ) -> Float[Tensor, "batch block channels"]:
        """z with known latents in their places."""
        return z if self.pinned is None else torch.where(self.pinned[..., None], self.known, z)

    def velocity(
        self, z: Float[Tensor, "batch block channels"], step: int
    ) -> Float[Tensor, "batch block channels"]:
        """The velocity at a step of the time grid, guided where the settings say so."""
        z = self.pin(z)
        transport, config = self.transport, self.config
        if not (self.has_history and config.guides_at(transport.times[step])):
            return self._branches(z, step, 1)
        conditional, unconditional = self._branches(z, step, 2).chunk(2)
        scale = self.scale
        if config.released_rounding:
            conditional, unconditional, scale = (
                conditional.bfloat16(),
                unconditional.bfloat16(),
                scale.bfloat16(),
            )
        guided = guide(conditional, unconditional, scale).float()
        if config.guidance_rescale:
            counted = (
                torch.ones_like(z[..., 0], dtype=torch.bool)
                if self.pinned is None
                else ~self.pinned
            )
            guided = rescale_guided(guided, conditional.float(), counted, config.guidance_rescale)
        return guided

    def _branches(self, z: Tensor, step: int, count: int) -> Tensor:
        """Velocities of the conditional branch, or of both, conditional rows first, in one pass."""
        transport = self.transport
        # RoPE is relative: the unconditional branch may keep the conditional one's positions.
        z, positions = (torch.cat([x] * count) for x in (transport.passed(z), self.attention.slots))
        times = transport.times_at(
            step, None if self.pinned is None else torch.cat([self.pinned] * count)
        )
        velocity: Tensor = transport.denoise(z, times, positions, self.attention)
        # The memory of a CUDA graph's result is written anew by the next pass.
        return velocity.clone() if self.config.compile else velocity

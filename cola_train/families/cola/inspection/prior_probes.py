"""What prior and decoder make of latents.

Reconstruction under noise, token accuracy, flow matching by time and place, use of history.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cola_train.families.cola.inspection.latent_rows import (
    LatentRows,
    decode_after_history,
    likeliest_tokens,
    same_time,
    transport_all_blocks,
)
from cola_train.families.cola.inspection.tallies import Tally, paired_gain
from cola_train.families.cola.inspection.yardstick_probe import Yardsticks, YardstickTally
from cola_train.families.cola.losses import FlowConfig
from cola_train.families.cola.stage1 import standard_normal_latents
from cola_train.families.cola.stage2 import flow_draws, position_times
from cola_train.families.cola.yardsticks.reading import Statistics
from cola_train.flow import gaussian_baseline, interpolate, velocity_target
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose

# Each block has its own time, uniform, so that all times and blocks are seen alike; nothing is
# pinned or hidden.
_FLOW = FlowConfig(time_distribution="uniform", timestep_per="block", prompt_block_prob=0.0)


@dataclasses.dataclass(frozen=True)
class ReconstructionCurve:
    """Share of true tokens among the likeliest of p(x | z) by the noise time t of z (Figure 13).

    All latents of a row are noised alike.
    """

    times: list[float]
    noised: list[float]  # z = z_t = (1 - t) z_0 + t z_1, as it is
    # z = z_t - t v(z_t, t), what the DiT in one step takes z_0 for, given the true z_0 before
    denoised: list[float] | None


class ReconstructionTally:
    """Adds up a ReconstructionCurve at `num_times` times, evenly from 0 to 1."""

    def __init__(self, vae: TextVAE, dit: BlockCausalDiT | None, num_times: int) -> None:
        self.vae, self.dit = vae, dit
        self.times = [step / (num_times - 1) for step in range(num_times)]
        self.noised, self.denoised = Tally(num_times), Tally(num_times)

    def add(self, rows: LatentRows) -> None:
        for place, t in enumerate(self.times):
            z_t = interpolate(rows.z_0, rows.z_1, torch.tensor(t, device=rows.z_0.device))
            self._decode(self.noised, rows, z_t, place)
            if self.dit is not None:
                v = self.dit.velocity(z_t, rows.z_0, same_time(z_t, t), rows.document)
                self._decode(self.denoised, rows, z_t - t * v, place)

    def _decode(self, tally: Tally, rows: LatentRows, z: Tensor, place: int) -> None:
        right = likeliest_tokens(self.vae, self.vae.decoder(z, rows.document)) == rows.batch.tokens
        tally.add(right, rows.batch.loss_mask, torch.tensor(place, device=right.device))

    def result(self) -> ReconstructionCurve:
        denoised = None if self.dit is None else self.denoised.means()
        return ReconstructionCurve(self.times, self.noised.means(), denoised)


@dataclasses.dataclass(frozen=True)
class TokenAccuracy:
    """How often the likeliest token of the decoder is the true one."""

    share: float
    by_block: list[float]  # of latents, along the row
    by_position: list[float]  # of tokens, within their block


class TokenAccuracyTally:
    """Adds up the TokenAccuracy of what a decoder gives for rows."""

    def __init__(self, num_tokens: int, block_tokens: int) -> None:
        """Rows have `num_tokens`, in blocks of `block_tokens`."""
        place = torch.arange(num_tokens)
        self.block, self.position = place // block_tokens, place % block_tokens
        self.blocks, self.positions = Tally(num_tokens // block_tokens), Tally(block_tokens)

    def add(self, rows: LatentRows, likeliest: Int[Tensor, "batch seq"]) -> None:
        right, counted = likeliest == rows.batch.tokens, rows.batch.loss_mask
        self.blocks.add(right, counted, self.block.to(right.device))
        self.positions.add(right, counted, self.position.to(right.device))

    def result(self) -> TokenAccuracy:
        return TokenAccuracy(self.blocks.mean(), self.blocks.means(), self.positions.means())


def prior_tokens(
    vae: TextVAE, dit: BlockCausalDiT, rows: LatentRows, num_steps: int, seed: int
) -> Int[Tensor, "batch seq"]:
    """What the decoder makes of blocks that the prior transports from noise.

    Prior and decoder are given the true blocks before: posterior means, as a prompt's are to the
    sampler; guidance is 1.
    """
    history = rows.posterior.mean
    noise = standard_normal_latents(seed, Purpose.SAMPLER_NOISE, rows.batch, *history.shape[1:])
    blocks = transport_all_blocks(dit, history, noise, rows.document, num_steps)
    return decode_after_history(vae, history, blocks, rows.document, dit.config.block_size)


@dataclasses.dataclass(frozen=True)
class FlowByPlace:
    """The flow-matching loss at times that are uniform in [0, 1], one for each block.

    The mean of (v - (z_1 - z_0))^2 over latents and channels; beside it the loss of the best
    predictor that knows only each channel's mean and variance, at these very times
    (flow.gaussian_baseline), and those of who knows the codes of tokens and n-grams, at these very
    times and with this very noise; None where a latent holds several tokens.
    """

    loss: float
    bound: float
    time_bins: list[float]  # their edges
    loss_by_time: list[float]
    baseline_by_time: list[float]
    loss_by_block: list[float]
    baseline_by_block: list[float]
    yardsticks: Yardsticks | None


@dataclasses.dataclass(frozen=True)
class HistoryUse:
    """Flow-matching losses of blocks with their true history, another row's, and none.

    The noise is the same. Gains are over the true history, paired by row; above 0 the prior uses
    what comes before.
    """

    true_history: float
    shuffled_history: float
    no_history: float
    gain_over_shuffled: float
    gain_over_shuffled_standard_error: float
    gain_over_none: float
    gain_over_none_standard_error: float


class FlowTally:
    """Adds up FlowByPlace and HistoryUse."""

    def __init__(
        self,
        dit: BlockCausalDiT,
        num_latents: int,
        num_time_bins: int,
        seed: int,
        known: Statistics | None = None,
    ) -> None:
        """Rows have `num_latents` latents each; yardsticks are what knows `known`."""
        self.dit, self.seed, self.num_bins = dit, seed, num_time_bins
        self.num_blocks = num_latents // dit.config.block_size
        self.by_time, self.by_block = Tally(num_time_bins), Tally(self.num_blocks)
        self.yardsticks = None
        if known is not None:
            sizes = (num_time_bins, self.num_blocks)
            self.yardsticks = YardstickTally(known, dit.config.block_size, *sizes)
        self.times: list[Tensor] = []  # of counted latents, with their block
        # of z_0 and its square
        self.sums = torch.zeros(2, dit.config.txt_in_channels, dtype=torch.float64)
        # per row: losses with the three histories, added up, and how many latents they are of
        self.rows: list[Tensor] = []
        self.last: Tensor | None = None  # z_0 of the row before this batch

    def add(self, rows: LatentRows) -> None:
        """Add a batch of rows; the first one must have two or more."""
        block_size = self.dit.config.block_size
        draws = flow_draws(_FLOW, rows.batch.sample_index, self.num_blocks, block_size, self.seed)
        times = position_times(draws, block_size, _FLOW)
        t = draws.t.repeat_interleave(block_size, dim=1)
        block = (torch.arange(t.shape[1], device=t.device) // block_size).expand_as(t)
        z_t = interpolate(rows.z_0, rows.z_1, t[..., None])
        target = velocity_target(rows.z_0, rows.z_1)

        def errors(history: Tensor, sees_history: Tensor | None = None) -> Tensor:
            velocity = self.dit.velocity(z_t, history, times, rows.document, sees_history)
            return (velocity - target).square().mean(-1)

        error = errors(rows.z_0)
        self.by_time.add(error, rows.counted, self._bin(t))
        self.by_block.add(error, rows.counted, block)
        if self.yardsticks is not None:
            self.yardsticks.add(rows, (z_t, t), error, (self._bin(t), block))
        self.times.append(torch.stack([t[rows.counted], block[rows.counted].float()]).cpu())
        z_0 = rows.select(rows.z_0)
        self.sums += torch.stack([z_0.sum(0), z_0.square().sum(0)])
        if self.num_blocks == 1:
            return
        # Each row gets the history of the row before it, across batches; the very first one that of
        # the second.
        before = rows.z_0[1:2] if self.last is None else self.last
        self.last = rows.z_0[-1:]
        with_shuffled = errors(torch.cat([before, rows.z_0[:-1]]))
        with_none = errors(rows.z_0, torch.zeros_like(rows.counted))
        counted = rows.counted.clone()
        counted[:, :block_size] = False
        sums = [(loss.double() * counted).sum(1) for loss in (error, with_shuffled, with_none)]
        self.rows.append(torch.stack([*sums, counted.sum(1).double()]).cpu())

    def _bin(self, t: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        # The largest draw is below 1, but a product may round up.
        return (t * self.num_bins).long().clamp(max=self.num_bins - 1)

    def result(self) -> FlowByPlace:
        t, block = torch.cat(self.times, dim=1)
        mean, square = self.sums / t.shape[0]
        variance, bins = square - mean.square(), self._bin(t)

        def bounds(group: Tensor, size: int) -> list[float]:
            return [gaussian_baseline(variance, t[group == number]) for number in range(size)]

        return FlowByPlace(
            loss=self.by_time.mean(),
            bound=gaussian_baseline(variance, t),
            time_bins=[number / self.num_bins for number in range(self.num_bins + 1)],
            loss_by_time=self.by_time.means(),
            baseline_by_time=bounds(bins, self.num_bins),
            loss_by_block=self.by_block.means(),
            baseline_by_block=bounds(block, self.num_blocks),
            yardsticks=None if self.yardsticks is None else self.yardsticks.result(),
        )

    def history_use(self) -> HistoryUse | None:
        """The three losses and the gains; None where a row is one block, without a history."""
        if self.num_blocks == 1:
            return None
        true, shuffled, none, count = torch.cat(self.rows, dim=1)
        total = float(count.sum())
        return HistoryUse(
            float(true.sum()) / total,
            float(shuffled.sum()) / total,
            float(none.sum()) / total,
            *paired_gain(shuffled - true, count),
            *paired_gain(none - true, count),
        )

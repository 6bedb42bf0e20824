"""What prior and decoder make of latents: reconstruction under noise, hits, flow matching by time
and place, use of history.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cola_train.families.cola.config import FlowConfig
from cola_train.families.cola.flow_draws import flow_draws, position_times
from cola_train.families.cola.inspection.latent_rows import (
    LatentRows,
    decode_after_history,
    likeliest_tokens,
    same_time,
    transport_all_blocks,
)
from cola_train.families.cola.inspection.tally import Tally
from cola_train.families.cola.vae_losses import standard_normal_latents
from cola_train.flow import gaussian_baseline, interpolate, velocity_target
from cola_train.models.dit import BlockCausalDiT, Times
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose

# Each block has its own time, uniform, so that all times and blocks are seen alike; nothing is
# pinned or hidden.
_FLOW = FlowConfig(time_distribution="uniform", timestep_per="block", prompt_block_prob=0.0)


@dataclasses.dataclass(frozen=True)
class ReconstructionCurve:
    """Share of true tokens among the likeliest of p(x | z) against the noise time t of z, all
    latents of a row being noised
    (the paper's Figure 13)."""

    times: list[float]
    noised: list[float]  # z = z_t = (1 - t) z_0 + t z_1, as it is
    # z = z_t - t v(z_t, t), what the DiT in one step takes z_0 for, given the true z_0 before
    denoised: list[float] | None


class ReconstructionTally:
    """Adds up a ReconstructionCurve at `times`."""

    def __init__(self, vae: TextVAE, dit: BlockCausalDiT | None, times: Sequence[float]) -> None:
        self.vae, self.dit, self.times = vae, dit, list(times)
        self.noised, self.denoised = Tally(len(times)), Tally(len(times))

    def add(self, rows: LatentRows) -> None:
        """Add some rows."""
        for place, t in enumerate(self.times):
            z_t = interpolate(rows.z_0, rows.z_1, torch.tensor(t, device=rows.z_0.device))
            self._decode(self.noised, rows, z_t, place)
            if self.dit is not None:
                self._decode(
                    self.denoised,
                    rows,
                    z_t - t * self.dit.velocity(z_t, rows.z_0, same_time(z_t, t), rows.document),
                    place,
                )

    def _decode(self, tally: Tally, rows: LatentRows, z: Tensor, place: int) -> None:
        right = likeliest_tokens(self.vae, self.vae.decoder(z, rows.document)) == rows.batch.tokens
        tally.add(right, rows.batch.loss_mask, torch.tensor(place, device=right.device))

    def curve(self) -> ReconstructionCurve:
        """Of what was added."""
        return ReconstructionCurve(
            self.times, self.noised.means(), None if self.dit is None else self.denoised.means()
        )


@dataclasses.dataclass(frozen=True)
class TokenAccuracy:
    """How often the likeliest token of the decoder is the true one."""

    share: float
    by_block: list[float]  # of latents, along the row
    by_position: list[float]  # of tokens, within their block


class TokenAccuracyTally:
    """Adds up TokenAccuracy."""

    def __init__(self, num_tokens: int, block_tokens: int) -> None:
        """Of rows of `num_tokens` in blocks of `block_tokens`."""
        place = torch.arange(num_tokens)
        self.block, self.position = place // block_tokens, place % block_tokens
        self.blocks, self.positions = Tally(num_tokens // block_tokens), Tally(block_tokens)

    def add(self, rows: LatentRows, found: Int[Tensor, "batch seq"]) -> None:
        """Add what was decoded for some rows."""
        right, counted = found == rows.batch.tokens, rows.batch.loss_mask
        self.blocks.add(right, counted, self.block.to(found.device))
        self.positions.add(right, counted, self.position.to(found.device))

    def hits(self) -> TokenAccuracy:
        """Of what was added."""
        return TokenAccuracy(self.blocks.mean(), self.blocks.means(), self.positions.means())


class TokenTally:
    """Counts tokens, for what can be hit without looking at latents."""

    def __init__(self) -> None:
        self.uses: Counter[int] = Counter()

    def add(self, rows: LatentRows) -> None:
        """Add some rows."""
        self.uses.update(rows.batch.tokens[rows.batch.loss_mask].tolist())

    def majority_accuracy(self) -> float:
        """What always saying the commonest token hits."""
        return max(self.uses.values()) / self.uses.total()

    def chance_token_accuracy(self) -> float:
        """What drawing tokens by their frequencies hits: the sum of squared shares."""
        return sum((uses / self.uses.total()) ** 2 for uses in self.uses.values())


def posterior_tokens(vae: TextVAE, rows: LatentRows) -> Int[Tensor, "batch seq"]:
    """What the decoder says to posterior samples."""
    return likeliest_tokens(vae, vae.decoder(rows.z_0, rows.document))


def prior_tokens(
    vae: TextVAE, dit: BlockCausalDiT, rows: LatentRows, num_steps: int, seed: int
) -> Int[Tensor, "batch seq"]:
    """What the decoder says to blocks that the prior transports from noise, both given the true
    blocks before.

    History is posterior means, as a prompt's is to the sampler; guidance is 1.
    """
    history = rows.posterior.mean
    noise = standard_normal_latents(seed, Purpose.SAMPLER_NOISE, rows.batch, *history.shape[1:])
    blocks = transport_all_blocks(dit, history, noise, rows.document, num_steps)
    return decode_after_history(vae, history, blocks, rows.document, dit.config.block_size)


@dataclasses.dataclass(frozen=True)
class FlowByPlace:
    """The flow-matching loss, the mean of (v - (z_1 - z_0))^2 over latents and channels, at times
    uniform in [0, 1], one a block.

    Beside it the loss of the best predictor that knows only each channel's mean and variance, at
    these very times (flow.gaussian_baseline).
    """

    loss: float
    bound: float
    time_bins: list[float]  # their edges
    loss_by_time: list[float]
    baseline_by_time: list[float]
    loss_by_block: list[float]
    baseline_by_block: list[float]


@dataclasses.dataclass(frozen=True)
class HistoryUse:
    """Flow-matching losses of blocks that have a history, with the true one, one of another row,
    and none, on the same noise.

    Gains are over the true history, paired by row; above 0 the prior uses what comes before.
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
        self, dit: BlockCausalDiT, num_latents: int, num_time_bins: int, seed: int
    ) -> None:
        """Of rows of `num_latents`."""
        self.dit, self.seed, self.num_bins = dit, seed, num_time_bins
        self.num_blocks = num_latents // dit.config.block_size
        self.by_time, self.by_block = Tally(num_time_bins), Tally(self.num_blocks)
        self.times: list[Tensor] = []  # of counted latents, with their block
        # of z_0 and its square
        self.sums = torch.zeros(2, dit.config.txt_in_channels, dtype=torch.float64)
        # per row: losses with the three histories, added up, and how many latents they are of
        self.rows: list[Tensor] = []
        self.last: Tensor | None = None  # z_0 of the row before this batch

    def add(self, rows: LatentRows) -> None:
        """Add some rows; the first ones must be two or more."""
        block_size = self.dit.config.block_size
        draws = flow_draws(_FLOW, rows.batch.sample_index, self.num_blocks, block_size, self.seed)
        times = position_times(draws, block_size, _FLOW)
        t = draws.t.repeat_interleave(block_size, dim=1)
        block = (torch.arange(t.shape[1], device=t.device) // block_size).expand_as(t)
        error = self._errors(rows, rows.z_0, times, t)
        # The largest draw is below 1, but a product may round up.
        self.by_time.add(
            error, rows.counted, (t * self.num_bins).long().clamp(max=self.num_bins - 1)
        )
        self.by_block.add(error, rows.counted, block)
        self.times.append(torch.stack([t[rows.counted], block[rows.counted].float()]).cpu())
        z_0 = rows.z_0[rows.counted].double().cpu()
        self.sums += torch.stack([z_0.sum(0), z_0.square().sum(0)])
        self._compare_histories(rows, times, t, error)

    def _errors(
        self,
        rows: LatentRows,
        history: Float[Tensor, "batch latents channels"],
        times: Times,
        t: Float[Tensor, "batch latents"],
        sees_history: Bool[Tensor, "batch latents"] | None = None,
    ) -> Float[Tensor, "batch latents"]:
        z_t = interpolate(rows.z_0, rows.z_1, t[..., None])
        velocity = self.dit.velocity(z_t, history, times, rows.document, sees_history)
        return (velocity - velocity_target(rows.z_0, rows.z_1)).square().mean(-1)

    def _compare_histories(
        self, rows: LatentRows, times: Times, t: Tensor, with_true: Tensor
    ) -> None:
        if self.num_blocks == 1:
            return
        # Each row gets the history of the row before it, across batches; the very first one that of
        # the second.
        before = rows.z_0[1:2] if self.last is None else self.last
        self.last = rows.z_0[-1:]
        with_shuffled = self._errors(rows, torch.cat([before, rows.z_0[:-1]]), times, t)
        with_none = self._errors(rows, rows.z_0, times, t, torch.zeros_like(rows.counted))
        counted = rows.counted.clone()
        counted[:, : self.dit.config.block_size] = False
        sums = [
            (error.double() * counted).sum(1) for error in (with_true, with_shuffled, with_none)
        ]
        self.rows.append(torch.stack([*sums, counted.sum(1).double()]).cpu())

    def flow(self) -> FlowByPlace:
        """Of what was added."""
        t, block = torch.cat(self.times, dim=1)
        mean, square = self.sums / t.shape[0]
        variance = square - mean.square()
        bins = (t * self.num_bins).long().clamp(max=self.num_bins - 1)

        def bound(chosen: Tensor) -> float:
            return gaussian_baseline(variance, t[chosen])

        return FlowByPlace(
            self.by_time.mean(),
            gaussian_baseline(variance, t),
            [number / self.num_bins for number in range(self.num_bins + 1)],
            self.by_time.means(),
            [bound(bins == number) for number in range(self.num_bins)],
            self.by_block.means(),
            [bound(block == number) for number in range(self.num_blocks)],
        )

    def history_use(self) -> HistoryUse | None:
        """Of what was added; None where rows are of one block, which has no history."""
        if self.num_blocks == 1:
            return None
        true, shuffled, none, count = torch.cat(self.rows, dim=1)
        total = float(count.sum())
        return HistoryUse(
            float(true.sum()) / total,
            float(shuffled.sum()) / total,
            float(none.sum()) / total,
            *_paired_gain(shuffled - true, count),
            *_paired_gain(none - true, count),
        )


def _paired_gain(
    difference: Float[Tensor, " rows"], count: Float[Tensor, " rows"]
) -> tuple[float, float]:
    """Mean difference per latent, and its standard error over rows (of a ratio of sums, to first
    order).
    """
    gain = float(difference.sum() / count.sum())
    rest = difference - gain * count
    rows = len(count)
    return gain, math.sqrt(float(rest.square().sum()) * rows / (rows - 1)) / float(count.sum())

"""What n-gram denoisers make of the latents, noise and times that a DiT is given."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cola_train.families.cola.inspection.latent_rows import LatentRows, Latents
from cola_train.families.cola.inspection.tallies import Estimate, resampled_means
from cola_train.families.cola.yardsticks.denoisers import (
    Blocks,
    bigram_velocity,
    unigram_velocity,
)
from cola_train.families.cola.yardsticks.reading import Statistics
from cola_train.flow import velocity_target
from cola_train.likelihood.token_tables import text_starts

_FACTS = ("num_rows", "num_code_rows", "num_unseen", "within_variance", "posterior_variance")


@dataclasses.dataclass(frozen=True)
class Yardstick:
    """The least flow loss of who knows the codes and how tokens are distributed, nothing else.

    Differences are the DiT's loss less it: below 0 the DiT knows more.
    """

    loss: float
    loss_by_time: list[float]
    loss_by_block: list[float]
    difference: Estimate
    difference_by_time: list[Estimate]
    difference_by_block: list[Estimate]


@dataclasses.dataclass(frozen=True)
class Yardsticks:
    """Both yardsticks, and what they were read off; its figures are as in `Statistics`."""

    unigram: Yardstick
    bigram: Yardstick
    num_rows: int
    num_code_rows: int
    num_unseen: int
    within_variance: float
    posterior_variance: float

    def items(self) -> Iterator[tuple[str, Yardstick]]:
        """The yardsticks with their names, the one that knows less first."""
        yield from (("unigram", self.unigram), ("bigram", self.bigram))

    def metrics(self) -> dict[str, float]:
        """The single metrics, by names that stay."""
        found = {}
        for name, yardstick in self.items():
            found[f"flow_{name}"] = yardstick.loss
            found[f"flow_minus_{name}"] = yardstick.difference.mean
            found[f"flow_minus_{name}_standard_error"] = yardstick.difference.standard_error
        return found

    def remarks(self) -> list[str]:
        """What they say of the prior, a sentence each."""
        return [_remark(name, yardstick.difference) for name, yardstick in self.items()]


def _remark(name: str, found: Estimate) -> str:
    verdict = f"knows neither more nor less than a {name} table, as far as these rows tell"
    if found.high < 0 or found.low > 0:
        verdict = f"knows {'more' if found.high < 0 else 'less'} than a {name} table"
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    return f"The prior {verdict}: its flow loss less the table's is {found.mean:+.4f} ({interval})."


class YardstickTally:
    """Adds up Yardsticks, beside the DiT's own errors."""

    def __init__(
        self, known: Statistics, block_size: int, num_time_bins: int, num_blocks: int
    ) -> None:
        self.known, self.block_size, self.num_bins = known, block_size, num_time_bins
        self.num_groups = num_time_bins + num_blocks
        # per row and group: errors of DiT, unigram and bigram added up, and how many they are
        self.rows: list[Float64[Tensor, "sums rows groups"]] = []

    def add(
        self,
        rows: LatentRows,
        noised: tuple[Latents, Float[Tensor, "batch latents"]],
        error: Float[Tensor, "batch latents"],
        groups: tuple[Int[Tensor, "batch latents"], Int[Tensor, "batch latents"]],
    ) -> None:
        """Add rows: z_t and t in `noised`, the DiT's `error`, the latents' bins and blocks."""
        codebook, bigram, tokens = self.known.codebook, self.known.bigram, rows.batch.tokens
        starts = text_starts(rows.batch, rows.document is not None)
        blocks = Blocks.of(*noised, tokens, starts, rows.counted, self.block_size)
        target = velocity_target(rows.z_0, rows.z_1)
        best = (unigram_velocity(codebook, blocks), bigram_velocity(codebook, bigram, blocks))
        errors = [(v.view_as(target) - target).square().mean(-1) for v in best]
        counted = rows.counted.double()
        group = torch.cat([groups[0], groups[1] + self.num_bins], dim=1)
        sums = counted.new_zeros(4, len(group), self.num_groups)
        for total, values in zip(sums, (error, *errors, counted), strict=True):
            total.scatter_add_(1, group, (values.double() * counted).repeat(1, 2))
        self.rows.append(sums.cpu())

    def result(self) -> Yardsticks:
        """Each yardstick over all rows."""
        sums = torch.cat(self.rows, dim=1).numpy()
        # Bins and blocks are two divisions of the same latents.
        whole = np.concatenate([sums, sums[..., : self.num_bins].sum(-1, keepdims=True)], axis=-1)
        dit, unigram, bigram, counts = whole

        def yardstick(errors: Float64[np.ndarray, "rows groups"]) -> Yardstick:
            with np.errstate(invalid="ignore"):
                means = (errors.sum(0) / counts.sum(0)).tolist()
            found = resampled_means(dit - errors, counts)
            bins, blocks = slice(self.num_bins), slice(self.num_bins, -1)
            losses = (means[-1], means[bins], means[blocks])
            differences = (found[-1], found[bins], found[blocks])
            return Yardstick(*losses, *differences)

        facts = {name: getattr(self.known, name) for name in _FACTS}
        return Yardsticks(yardstick(unigram), yardstick(bigram), **facts)

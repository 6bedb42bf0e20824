"""Held-out tokens in nats: a checkpoint's bound, and n-gram tables in its prior's place and alone.

The bound is that of families/cola/denoising_bound.py, for every denoiser by the same draws. Latents
of padding are seen but not counted.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.denoising_bound import (
    Velocity,
    latent_rates,
    packed_velocity,
    stratified,
)
from cola_train.families.cola.inspection.latent_rows import LatentRows, Latents
from cola_train.families.cola.inspection.tallies import Estimate, resampled_means
from cola_train.families.cola.yardsticks.denoisers import (
    Blocks,
    bigram_velocity,
    unigram_velocity,
)
from cola_train.likelihood.rows import Draw, ScoredRow, draws_at
from cola_train.likelihood.token_tables import BigramModel, text_starts
from cola_train.models.codebook import Codebook
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.vocabulary_head import row_nats
from cola_train.randomness import Purpose, normal, uniform

# name in metrics -> name in the table, and what it is
_MODELS = {
    "elbo": ("this model", "an upper bound of -log p of the tokens (the ELBO), as `likelihood`'s"),
    "elbo_unigram": (
        "codes and unigrams",
        "the same bound, had the prior known the codes and how frequent tokens are, no more",
    ),
    "elbo_bigram": (
        "codes and bigrams",
        "the same bound, had the prior known the codes and which token follows which, no more",
    ),
    "unigram": (
        "unigram table",
        "cross-entropy of the tokens: about the best that codes and unigrams could be",
    ),
    "bigram": (
        "bigram table",
        "cross-entropy of the tokens after the one before, which the table always knows",
    ),
    "uniform": ("uniform", "a guess among all ids"),
}


@dataclasses.dataclass(frozen=True)
class ModelNats:
    """-log p of held-out tokens under one model, or a bound of it; sums over sums of rows.

    Attributes:
        meaning: for people.
        per_token: tokens that end documents are counted.
        per_byte: over the UTF-8 bytes of the tokens' text; None where these are not known.
        elbo_less_it: nats a token by which the checkpoint's bound is above it, paired by row; None
            of itself.
    """

    meaning: str
    per_token: Estimate
    per_byte: Estimate | None
    elbo_less_it: Estimate | None


@dataclasses.dataclass(frozen=True)
class Nats:
    """All models of the same tokens, by `num_draws` draws of latents and levels of each row.

    `reconstruction` is the part of every bound that is -log p(x | z_0), nats a token; `num_bytes`
    is None where the text is not known. Where a latent holds several tokens, tables have no codes.
    """

    num_draws: int
    num_tokens: int
    num_bytes: int | None
    reconstruction: float
    models: dict[str, ModelNats]

    def metrics(self) -> dict[str, float]:
        """The single metrics, by names that stay."""
        found = {}
        for name, model in self.models.items():
            found[f"{name}_nats_per_token"] = model.per_token.mean
            if model.per_byte is not None:
                found[f"{name}_nats_per_byte"] = model.per_byte.mean
            if name == "elbo":
                error = model.per_token.standard_error
                found["elbo_nats_per_token_standard_error"] = error
                found["elbo_reconstruction_nats_per_token"] = self.reconstruction
        return found

    def table(self) -> str:
        """The lines that people read."""
        text = "text that is not known" if self.num_bytes is None else f"{self.num_bytes:,} bytes"
        lines = [
            f"{self.num_tokens:,} tokens, {text}; {self.num_draws} draws of latents and noise "
            "levels a row",
            f"  {'nats':20}{'a token':>9}  {'95 % interval':16}  {'a byte':>7}  this model less it",
        ]
        for name, model in self.models.items():
            byte = "-" if model.per_byte is None else f"{model.per_byte.mean:.4f}"
            less, token = "", model.per_token
            if model.elbo_less_it is not None:
                less = "{:+.3f} ({:+.3f} to {:+.3f})".format(*_ends(model.elbo_less_it))
            interval = f"{token.low:.3f} to {token.high:.3f}"
            row = f"  {_MODELS[name][0]:20}{token.mean:9.3f}  {interval:16}  {byte:>7}  {less}"
            lines.append(row.rstrip())
        lines += [f"  {_MODELS[name][0]}: {model.meaning}" for name, model in self.models.items()]
        if self.num_bytes is None:
            lines.append(
                "  Nats a byte are not available: these tokens have no text, or one of them stands "
                "for text that the tokenizer does not know."
            )
        return "\n".join(lines)


def _ends(found: Estimate) -> tuple[float, float, float]:
    return found.mean, found.low, found.high


class NatsTally:
    """Adds up Nats."""

    def __init__(
        self,
        vae: TextVAE,
        dit: BlockCausalDiT,
        tokenizer: Tokenizer,
        bigram: BigramModel,
        codebook: Codebook | None,
        num_draws: int,
        seed: int,
    ) -> None:
        """`codebook` is None where a latent holds several tokens."""
        self.vae, self.dit, self.tokenizer = vae, dit, tokenizer
        self.bigram, self.codebook = bigram, codebook
        self.num_draws, self.seed = num_draws, seed
        # by model, and of what they are of: sums over each row
        self.rows: list[Mapping[str, Float64[Tensor, " rows"]]] = []
        self.num_bytes: list[int | None] = []  # of each row

    def add(self, rows: LatentRows) -> None:
        """Add a batch of rows."""
        tokens, counted = rows.batch.tokens, rows.batch.loss_mask
        starts = text_starts(rows.batch, rows.document is not None)
        sums = {"tokens": counted.double().sum(1)}
        for name, nats in zip(("unigram", "bigram"), self.bigram.nats(tokens, starts), strict=True):
            sums[name] = (nats.double() * counted).sum(1)
        sums["uniform"] = sums["tokens"] * math.log(self.vae.config.vocab_size)
        for number in range(self.num_draws):
            for name, nats in self._bounds(rows, starts, number).items():
                sums[name] = sums.get(name, 0) + nats / self.num_draws
        self.rows.append({name: values.cpu() for name, values in sums.items()})
        self.num_bytes += [
            self.tokenizer.num_bytes(row[own].tolist())
            for row, own in zip(tokens, counted, strict=True)
        ]

    def _bounds(
        self, rows: LatentRows, starts: Bool[Tensor, "batch seq"], number: int
    ) -> dict[str, Float64[Tensor, " batch"]]:
        """One draw of each bound, the addresses being those of `likelihood`; nats of rows."""
        batch, posterior, shape = rows.batch, rows.posterior, rows.z_0.shape[1:]
        size = self.dit.config.block_size
        keyed = [ScoredRow((), key) for key in batch.sample_index.tolist()]
        draws = [Draw(row, number) for row in range(len(keyed))]

        def drawn(kind: Callable[..., Tensor], purpose: Purpose, count: int) -> Tensor:
            return draws_at(kind, self.seed, purpose, keyed, draws, count, rows.z_0.device)

        eps, noise = (
            drawn(normal, purpose, math.prod(shape)).unflatten(1, shape)
            for purpose in (Purpose.LIKELIHOOD_EPS, Purpose.LIKELIHOOD_NOISE)
        )
        z_0, offsets = posterior.sample(eps), drawn(uniform, Purpose.LIKELIHOOD_LEVEL, 1)[:, 0]
        numbers = torch.full_like(offsets, number)
        quantiles = stratified(offsets, numbers, self.num_draws, shape[0] // size)
        hidden = self.vae.decoder(z_0, rows.document)
        nats = row_nats(self.vae.decoder.head, hidden, batch.tokens)
        reconstruction = (nats * batch.loss_mask).sum(1)
        denoisers = {"elbo": packed_velocity(self.dit, z_0, rows.document)}
        if self.codebook is not None:
            denoisers |= _tables(self.codebook, self.bigram, rows, starts, size)
        found = {"reconstruction": reconstruction}
        for name, velocity in denoisers.items():
            rates = latent_rates(velocity, posterior, z_0, noise, quantiles)
            found[name] = reconstruction + (rates * rows.counted).sum(1)
        return found

    def result(self) -> Nats:
        """Each model over all rows."""
        sums = {name: torch.cat([part[name] for part in self.rows]) for name in self.rows[0]}
        tokens, reconstruction = sums.pop("tokens").numpy(), sums.pop("reconstruction")
        known = [count for count in self.num_bytes if count is not None]
        whole = sum(known) if len(known) == len(self.num_bytes) else 0
        names = [name for name in _MODELS if name in sums]
        nats = torch.stack([sums[name] for name in names], dim=1).numpy()

        def per(counts: np.ndarray, of: np.ndarray = nats) -> list[Estimate]:
            return resampled_means(of, np.broadcast_to(counts[:, None], of.shape))

        by_byte: list[Estimate | None] = [None] * len(names)
        if whole:
            by_byte = [*per(np.array(known, dtype=np.float64))]
        by_token, less = per(tokens), per(tokens, nats[:, :1] - nats)
        return Nats(
            self.num_draws,
            int(tokens.sum()),
            whole or None,
            float(reconstruction.sum() / tokens.sum()),
            {
                name: ModelNats(
                    _MODELS[name][1],
                    by_token[place],
                    by_byte[place],
                    less[place] if place else None,
                )
                for place, name in enumerate(names)
            },
        )


def _tables(
    codebook: Codebook,
    bigram: BigramModel,
    rows: LatentRows,
    starts: Bool[Tensor, "batch latents"],
    size: int,
) -> dict[str, Velocity]:
    """Denoisers that know the codes and a table; the bigram's the clean token before a block, too.

    As a model of text that is one whose decoder names a block's tokens before the next block.
    """

    def blocks(z_t: Latents, t: Tensor) -> Blocks:
        times = t.float().repeat_interleave(size, dim=1)
        return Blocks.of(z_t, times, rows.batch.tokens, starts, rows.counted, size)

    return {
        "elbo_unigram": lambda z_t, t: unigram_velocity(codebook, blocks(z_t, t)).view_as(z_t),
        "elbo_bigram": lambda z_t, t: bigram_velocity(codebook, bigram, blocks(z_t, t)).view_as(
            z_t
        ),
    }

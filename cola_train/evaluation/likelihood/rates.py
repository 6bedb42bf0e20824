"""Rows' likelihoods summed up, per token, and in words that say what they are."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.evaluation.likelihood.likelihood import RowLikelihood
from cola_train.families.checkpoint import Checkpoint


@dataclasses.dataclass(frozen=True)
class Rate:
    """-log p per token, a ratio of sums over rows.

    Attributes:
        standard_error: over rows, so that it covers the choice of rows and the draws, in nats per
            token; None of one row.
    """

    nats_per_token: float
    standard_error: float | None

    @property
    def perplexity(self) -> float:
        """exp of the nats per token; infinite from 700 on, where it overflows."""
        return math.inf if self.nats_per_token >= 700 else math.exp(self.nats_per_token)


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The likelihood of rows together, per token.

    Attributes:
        kind: what `nats` is of the exact rate: itself (AR), an upper bound (LLaDA, Cola), or an
            estimate of a bound: by Cola's method=ode, or the difference of two bounds.
        nats: by the kind.
        iwae: IWAE's, of method=ode alone.
        iwae_holds: False where it is too low, since log p(z_0) was Hutchinson's estimate (`iwae`,
            importance.py).
        step_change: what twice as many steps of the solver add to `nats`, in nats per token; None
            where no solver with a number of steps found it.
        parts: Cola's ELBO in nats per token: -log p(x | z_0) and -log p(z_0), from which
            -log q(z_0 | x) is subtracted.
        bits_per_byte: `nats` over the scored text's UTF-8 bytes; an end-of-text token has none.
    """

    num_rows: int
    num_tokens: int
    kind: Literal["exact", "bound", "estimate"]
    nats: Rate
    iwae: Rate | None
    iwae_holds: bool
    step_change: float | None
    parts: dict[str, float]
    bits_per_byte: float | None

    def metrics(self) -> dict[str, float]:
        """The metrics for a log, by names that say the unit; IWAE's only where it holds.

        A bound is called elbo, whatever it is called in a paper.
        """
        name = "elbo" if self.kind == "bound" else self.kind
        found = {}
        for kind, rate in ((name, self.nats), ("iwae", self.iwae if self.iwae_holds else None)):
            if rate is not None:
                found[f"{kind}_nats_per_token"] = rate.nats_per_token
                found[f"{kind}_perplexity"] = rate.perplexity
        found |= {f"{part}_nats_per_token": value for part, value in self.parts.items()}
        if self.nats.standard_error is not None:
            found[f"{name}_standard_error"] = self.nats.standard_error
        if self.step_change is not None:
            found[f"{name}_step_change"] = self.step_change
        return found


def perplexity_of(
    checkpoint: Checkpoint,
    found: Sequence[RowLikelihood],
    config: LikelihoodConfig,
    num_bytes: int | None = None,
    conditional: bool = False,
) -> Perplexity:
    """Sum up rows' likelihoods, found with `config`.

    `num_bytes` is their text's UTF-8 length; `conditional` says that some had given tokens.
    """
    tokens = np.array([row.num_tokens for row in found])
    nats = np.array([-row.log_p for row in found])
    bounds = [row.iwae for row in found if row.iwae is not None]
    parts = {}
    for part, sign in {"reconstruction": -1, "prior": -1, "entropy": 1}.items():
        values = [getattr(row, part) for row in found]
        if None not in values:
            parts[part] = sign * sum(values) / float(tokens.sum())
    changes = [row.step_change for row in found if row.step_change is not None]
    of_latents = checkpoint.likelihood_kind == "ELBO"
    kind: Literal["exact", "bound", "estimate"] = (
        "exact" if checkpoint.likelihood_kind == "exact" else "bound"
    )
    if of_latents and (config.method == "ode" or conditional):
        kind = "estimate"
    return Perplexity(
        num_rows=len(found),
        num_tokens=int(tokens.sum()),
        kind=kind,
        nats=rate_of(nats, tokens),
        iwae=rate_of(-np.array(bounds), tokens) if bounds else None,
        iwae_holds=config.divergence == "exact",
        step_change=-sum(changes) / float(tokens.sum()) if changes else None,
        parts=parts,
        bits_per_byte=float(nats.sum() / math.log(2) / num_bytes) if num_bytes else None,
    )


def rate_of(nats: np.ndarray, tokens: np.ndarray) -> Rate:
    """Sum over sum, and the error of that ratio by the delta method."""
    rate = float(nats.sum() / tokens.sum())
    if len(nats) == 1:
        return Rate(rate, None)
    squares = (nats - rate * tokens) ** 2
    error = np.sqrt(squares.sum() / (len(nats) * (len(nats) - 1))) / tokens.mean()
    return Rate(rate, float(error))


def table(perplexity: Perplexity, beside: Mapping[str, Rate]) -> str:
    """The lines that people read, with other models' rates of the same rows `beside`."""
    rates: dict[str, Rate] = {perplexity.kind: perplexity.nats}
    if perplexity.iwae is not None:
        rates["IWAE"] = perplexity.iwae
    lines = [
        f"{perplexity.num_rows:,} rows, {perplexity.num_tokens:,} tokens",
        f"  {'':8}{'nats per token':>22}{'perplexity':>24}",
    ]
    for name, rate in {**rates, **beside}.items():
        nats, exponent = f"{rate.nats_per_token:.4f}", f"{rate.perplexity:,.4g}"
        if rate.standard_error is not None:
            nats += f" ± {rate.standard_error:.4f}"
            exponent += f" ± {rate.perplexity * rate.standard_error:,.2g}"
        lines.append(f"  {name:8}{nats:>22}{exponent:>24}")
    if perplexity.iwae is not None and not perplexity.iwae_holds:
        lines.append(
            "  IWAE is too low with Hutchinson's divergence, whose noise it takes for likelihood; "
            "divergence=exact has none."
        )
    if perplexity.step_change is not None:
        lines.append(f"  twice as many steps: {perplexity.step_change:+.4f} nats per token")
    if perplexity.parts:
        lines.append(
            "  {} = reconstruction {reconstruction:.4f} + prior {prior:.4f} - entropy "
            "{entropy:.4f}".format(perplexity.kind, **perplexity.parts)
        )
    if perplexity.bits_per_byte is None:
        lines.append("  no bits per byte: the text of these tokens is not known")
    else:
        lines.append(f"  {perplexity.bits_per_byte:.4f} bits per byte")
    return "\n".join(lines) + "\n"

"""What the VAE's posterior holds: scale against noise, active units, divergences, drift from
another encoder, a map.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.inspection.latent_rows import LatentRows
from cola_train.models.posterior import Posterior
from cola_train.models.text_vae import TextVAEEncoder

# Burda et al. 2016, section 5.3: a unit is active if its posterior mean varies by more than this
# over the data.
ACTIVE_VARIANCE = 0.01
TOKEN_KINDS = ("word start", "inside a word", "punctuation", "blank", "special")
_NUM_LABELS = 8


@dataclasses.dataclass(frozen=True)
class PosteriorHealth:
    """Of q(z_0 | x) over latents that count; lists have an entry per channel, divergences are nats
    per latent.

    log_snr: log(mean(mu^2) / mean(sigma^2)) over all channels (method, section 1), and of each
        channel alone.
    mean_variance: variance of mu over the data. Channels above ACTIVE_VARIANCE are active units.
    kl: mean KL(q || N(0, 1)).
    information: mean KL(q || N(m, s^2)), m and s^2 being mean and variance of z_0 over the data: an
        upper bound on what a channel alone tells about the text, (log s^2 - mean log sigma^2) / 2.
    z_variance: s^2.
    """

    log_snr: float
    active_units: int
    kl_nats_per_token: float  # summed over channels, per real token, as training logs it
    log_snr_per_channel: list[float]
    mean_variance_per_channel: list[float]
    kl_per_channel: list[float]
    information_per_channel: list[float]
    z_variance_per_channel: list[float]

    @property
    def active_units_share(self) -> float:
        """Of all channels."""
        return self.active_units / len(self.kl_per_channel)


class PosteriorTally:
    """Adds up what PosteriorHealth is computed from."""

    def __init__(self, channels: int) -> None:
        self.mean, self.square, self.variance, self.logvar, self.kl = torch.zeros(
            5, channels, dtype=torch.float64
        )
        self.latents = self.tokens = 0

    def add(self, rows: LatentRows) -> None:
        """Add some rows."""
        mean, logvar = (_counted(x, rows) for x in (rows.posterior.mean, rows.posterior.logvar))
        self.mean += mean.sum(0)
        self.square += mean.square().sum(0)
        self.variance += logvar.exp().sum(0)
        self.logvar += logvar.sum(0)
        self.kl += _per_channel(rows, None)
        self.latents += len(mean)
        self.tokens += int(rows.batch.loss_mask.sum())

    def health(self) -> PosteriorHealth:
        """Of what was added."""
        mean, square, variance, logvar, kl = (
            x / self.latents for x in (self.mean, self.square, self.variance, self.logvar, self.kl)
        )
        mean_variance = (square - mean.square()).clamp(min=0)
        z_variance = mean_variance + variance
        return PosteriorHealth(
            log_snr=(
                math.log(float(square.mean() / variance.mean())) if square.any() else -math.inf
            ),
            active_units=int((mean_variance > ACTIVE_VARIANCE).sum()),
            kl_nats_per_token=float(self.kl.sum()) / self.tokens,
            log_snr_per_channel=(square / variance).log().tolist(),
            mean_variance_per_channel=mean_variance.tolist(),
            kl_per_channel=kl.tolist(),
            information_per_channel=(0.5 * (z_variance.log() - logvar)).tolist(),
            z_variance_per_channel=z_variance.tolist(),
        )


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far the encoder has moved from a reference on the same text."""

    kl_nats_per_token: float  # KL(q || q_ref), summed over channels, per real token
    rms_change_of_means: float  # per channel; the means themselves have mean square 1
    cosine_of_means: float  # mean over latents
    kl_per_channel: list[float]  # nats per latent


class DriftTally:
    """Adds up what Drift is computed from."""

    def __init__(self, reference: TextVAEEncoder) -> None:
        self.reference = reference
        self.kl = torch.zeros(reference.config.latent_dim, dtype=torch.float64)
        self.square = self.cosine = 0.0
        self.latents = self.tokens = 0

    def add(self, rows: LatentRows) -> None:
        """Add some rows."""
        other: Posterior = self.reference(rows.batch.tokens, rows.document)
        mean, reference = (_counted(x, rows) for x in (rows.posterior.mean, other.mean))
        self.kl += _per_channel(rows, other)
        self.square += float((mean - reference).square().mean(-1).sum())
        self.cosine += float(torch.cosine_similarity(mean, reference, dim=-1).sum())
        self.latents += len(mean)
        self.tokens += int(rows.batch.loss_mask.sum())

    def drift(self) -> Drift:
        """Of what was added."""
        return Drift(
            float(self.kl.sum()) / self.tokens,
            math.sqrt(self.square / self.latents),
            self.cosine / self.latents,
            (self.kl / self.latents).tolist(),
        )


def _counted(values: Tensor, rows: LatentRows) -> Tensor:
    """(latents, channels), of latents that count, in fp64 on the CPU."""
    return values[rows.counted].double().cpu()


def _per_channel(rows: LatentRows, other: Posterior | None) -> Tensor:
    """KL(q || other), or to N(0, I), added up over latents, per channel."""

    def apart(posterior: Posterior) -> Posterior:
        # A Posterior's divergences are summed over channels: each channel becomes a latent of its
        # own.
        return Posterior(
            *(_counted(x, rows)[..., None] for x in (posterior.mean, posterior.logvar))
        )

    own = apart(rows.posterior)
    return (own.kl_to_standard_normal() if other is None else own.kl_to(apart(other))).sum(0)


@dataclasses.dataclass(frozen=True)
class LatentMap:
    """Posterior means on their two principal axes, with the kind of the token that each is of (its
    first, if of several).
    """

    x: list[float]
    y: list[float]
    kind: list[str]  # of TOKEN_KINDS
    variance_shares: tuple[float, float]  # of each axis, of the means' whole variance
    # the commonest tokens' texts, and where their means are on average
    common_tokens: list[tuple[str, float, float]]


class MapTally:
    """Keeps the first `most` latents that count."""

    def __init__(self, most: int, tokenizer: Tokenizer, patch_size: int) -> None:
        self.most, self.tokenizer, self.patch_size = most, tokenizer, patch_size
        self.means: list[Float64[np.ndarray, "latents channels"]] = []
        self.tokens: list[int] = []
        self.kinds: list[str] = []

    def add(self, rows: LatentRows) -> None:
        """Add some rows, as far as there is room."""
        for tokens, counted, means in zip(
            rows.batch.tokens.tolist(), rows.counted, rows.posterior.mean, strict=True
        ):
            room = self.most - len(self.tokens)
            at = counted.nonzero()[:, 0][:room]
            if len(at) == 0:
                continue
            self.means.append(means[at].double().cpu().numpy())
            kinds = token_kinds(tokens, self.tokenizer)
            first = [place * self.patch_size for place in at.tolist()]
            self.tokens += [tokens[place] for place in first]
            self.kinds += [kinds[place] for place in first]

    def map(self) -> LatentMap:
        """Principal components of what was kept."""
        means = np.concatenate(self.means)
        centred = means - means.mean(0)
        _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
        # A component's sign is arbitrary: its largest entry is made positive.
        axes = axes[:2] * np.sign(axes[:2][[0, 1], np.abs(axes[:2]).argmax(1)])[:, None]
        places = centred @ axes.T
        shares = sizes[:2] ** 2 / max(float((sizes**2).sum()), 1e-300)
        tokens = np.array(self.tokens)
        common = []
        for token, _ in Counter(self.tokens).most_common(_NUM_LABELS):
            x, y = places[tokens == token].mean(0).tolist()
            common.append((self.tokenizer.decode([token], special_tokens=True), x, y))
        return LatentMap(
            np.round(places[:, 0], 4).tolist(),
            np.round(places[:, 1], 4).tolist(),
            list(self.kinds),
            (float(shares[0]), float(shares[1])),
            common,
        )


def token_kinds(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The kind of each token of a text: a word starts at a letter or digit that no other stands
    directly before.
    """
    kinds, before = [], ""
    for token in tokens:
        text = tokenizer.decode([token])
        bare = text.strip()
        if text == "":
            kinds.append("special")
        elif bare == "":
            kinds.append("blank")
        elif not bare[0].isalnum() and bare[0] != "\ufffd":
            kinds.append("punctuation")
        else:
            kinds.append(
                "inside a word" if text[0] == bare[0] and before[-1:].isalnum() else "word start"
            )
        before = text
    return kinds

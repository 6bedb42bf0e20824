"""What the VAE's posterior holds: signal and noise, active units, divergences, drift, a map."""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float64

from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.inspection.latent_rows import LatentRows
from cola_train.models.text_vae import Posterior, TextVAEEncoder

# Burda et al. 2016, section 5.3: a unit is active if its posterior mean varies by more than this
# over the data.
ACTIVE_VARIANCE = 0.01
TOKEN_KINDS = ("word start", "inside a word", "punctuation", "blank", "special")
_NUM_LABELS = 8


@dataclasses.dataclass(frozen=True)
class PosteriorHealth:
    """q(z_0 | x) over latents that count; lists have an entry per channel, KL is nats per latent.

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
        """Active units over all channels."""
        return self.active_units / len(self.kl_per_channel)


class PosteriorTally:
    """Adds up what PosteriorHealth is computed from."""

    def __init__(self, channels: int) -> None:
        # mean, its square, variance, log-variance and KL, by channel
        self.sums = torch.zeros(5, channels, dtype=torch.float64)
        self.latents = self.tokens = 0

    def add(self, rows: LatentRows) -> None:
        mean, logvar = rows.select(rows.posterior.mean), rows.select(rows.posterior.logvar)
        kl = _by_channel(rows, rows.posterior).kl_to_standard_normal()
        values = (mean, mean.square(), logvar.exp(), logvar, kl)
        self.sums += torch.stack([x.sum(0) for x in values])
        self.latents += len(mean)
        self.tokens += int(rows.batch.loss_mask.sum())

    def result(self) -> PosteriorHealth:
        mean, square, variance, logvar, kl = self.sums / self.latents
        mean_variance = (square - mean.square()).clamp(min=0)
        z_variance = mean_variance + variance
        log_snr = math.log(float(square.mean() / variance.mean())) if square.any() else -math.inf
        return PosteriorHealth(
            log_snr=log_snr,
            active_units=int((mean_variance > ACTIVE_VARIANCE).sum()),
            kl_nats_per_token=float(self.sums[4].sum()) / self.tokens,
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
        other: Posterior = self.reference(rows.batch.tokens, rows.document)
        mean, reference = rows.select(rows.posterior.mean), rows.select(other.mean)
        self.kl += _by_channel(rows, rows.posterior).kl_to(_by_channel(rows, other)).sum(0)
        self.square += float((mean - reference).square().mean(-1).sum())
        self.cosine += float(torch.cosine_similarity(mean, reference, dim=-1).sum())
        self.latents += len(mean)
        self.tokens += int(rows.batch.loss_mask.sum())

    def result(self) -> Drift:
        return Drift(
            kl_nats_per_token=float(self.kl.sum()) / self.tokens,
            rms_change_of_means=math.sqrt(self.square / self.latents),
            cosine_of_means=self.cosine / self.latents,
            kl_per_channel=(self.kl / self.latents).tolist(),
        )


def _by_channel(rows: LatentRows, posterior: Posterior) -> Posterior:
    """The posterior of latents that count, fp64, with each channel as a latent of its own.

    A Posterior's divergences are summed over channels: these are then (latents, channels).
    """
    return Posterior(*(rows.select(x)[..., None] for x in (posterior.mean, posterior.logvar)))


@dataclasses.dataclass(frozen=True)
class LatentMap:
    """Posterior means on their two principal axes, with the kind of each one's first token."""

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
        """Add a batch of rows, as far as there is room."""
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

    def result(self) -> LatentMap:
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
            x=np.round(places[:, 0], 4).tolist(),
            y=np.round(places[:, 1], 4).tolist(),
            kind=list(self.kinds),
            variance_shares=(float(shares[0]), float(shares[1])),
            common_tokens=common,
        )


def token_kinds(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The kind of each token of a text.

    A word starts at a letter or digit that no other stands directly before.
    """
    kinds, before = [], ""
    for token in tokens:
        text = tokenizer.decode([token])
        bare = text.strip()
        if text == "":
            kind = "special"
        elif bare == "":
            kind = "blank"
        elif not bare[0].isalnum() and bare[0] != "\ufffd":
            kind = "punctuation"
        elif text[0] == bare[0] and before[-1:].isalnum():
            kind = "inside a word"
        else:
            kind = "word start"
        kinds.append(kind)
        before = text
    return kinds

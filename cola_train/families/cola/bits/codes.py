"""Codes that a small network finds: each token a word of bits, near in text near in code.

A token's latent is its bits, each +a or -a in one channel and negated in another. A denoiser of one
bit is a tanh, so that a plain DiT need not search a codebook before it can learn text (compare
models/codebook_head.py, which has the search as arithmetic). Diffusion over bits is due to Chen,
Zhang and Hinton, "Analog Bits" (2022).
"""

import dataclasses

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from cola_train.families.cola.bits.sizes import bits_for
from cola_train.likelihood.token_tables import PairTally
from cola_train.randomness import named_generator

_WIDTH = 64  # directions in which neighbors are told apart
_POWER_STEPS = 4
# Pairs of each token that were not seen: without them a rare token is near to none.
_UNSEEN = 2.0
# What first bits are louder than later ones: they are told at more noise, so that sampling settles
# one after another and not all at once, each without the others.
_DECAY, _FLOOR = 0.8, 0.35


@dataclasses.dataclass(frozen=True)
class BitCodes:
    """Bits of each token, and what they are in latents.

    Attributes:
        bits: +1 or -1; no two tokens have the same.
        amplitude: of each bit in its two channels; their mean square is 1.
        log_odds: of +1 against -1 where nothing but token frequencies is known, in nats.
        log_p: of each token there, in nats.
    """

    bits: Float[Tensor, "tokens bits"]
    amplitude: Float[Tensor, " bits"]
    log_odds: Float[Tensor, " bits"]
    log_p: Float[Tensor, " tokens"]

    @property
    def codes(self) -> Float[Tensor, "tokens channels"]:
        """Latents of tokens: mean 0 and mean square 1, as the VAE's last norm makes them."""
        loud = self.bits * self.amplitude
        return torch.cat([loud, -loud], dim=1)

    @classmethod
    def of(cls, pairs: PairTally, channels: int) -> "BitCodes":
        """Codes of `channels` (two a bit) from which tokens stand beside which.

        Tokens are split in two again and again, where they differ most in their neighbors and
        so that both halves are as frequent: bits are near to fair coins that say much of context.
        A token that is alone before the last bit has +1 in the rest.
        """
        count, found = pairs.num_tokens, channels // 2
        assert channels % 2 == 0
        assert found >= bits_for(count)
        weight = pairs.unigram()
        bits = torch.ones(count, found)
        _split(bits, 0, torch.arange(count), _directions(pairs), weight)
        amplitude = _DECAY ** torch.arange(found) + _FLOOR
        p = (weight[:, None] * (bits > 0)).sum(0).clamp(1e-6, 1 - 1e-6)
        log_odds = (p / (1 - p)).log().float()
        amplitude /= amplitude.square().mean().sqrt()
        return cls(bits, amplitude, log_odds, weight.log().float())


def _directions(pairs: PairTally) -> Float64[Tensor, "tokens directions"]:
    """Points, near for tokens with the same neighbors: p-weighted principal directions.

    A token is sqrt(p(neighbor | token)) - sqrt(p(neighbor)) for the token before and the one after,
    as if _UNSEEN more pairs had been seen of each token, any neighbor in them: distances are
    Hellinger's. Found by a randomized range finder (Halko, Martinsson and Tropp, 2011).
    """
    count = pairs.num_tokens
    root = pairs.unigram().sqrt()
    first, second, times = pairs.pairs // count, pairs.pairs % count, pairs.pair_count.double()
    sparse, of_unseen, of_all = [], [], []
    for token, neighbor in ((first, second), (second, first)):
        seen = torch.zeros(count, dtype=torch.float64).index_add_(0, token, times)
        p = torch.zeros(count, dtype=torch.float64).index_add_(0, neighbor, times) + 0.5
        p /= p.sum()
        # Where a pair was not seen, the square root is of rank 1.
        without = (_UNSEEN / (seen + _UNSEEN)).sqrt()
        smoothed = (times + _UNSEEN * p[neighbor]) / (seen[token] + _UNSEEN)
        more = smoothed.sqrt() - without[token] * p[neighbor].sqrt()
        places = torch.stack([token, neighbor])
        sparse.append(
            torch.sparse_coo_tensor(
                places, root[token] * more, (count, count), check_invariants=True
            ).coalesce()
        )
        of_unseen.append(root * (without - 1))
        of_all.append(p.sqrt())

    def product(right: Tensor) -> Tensor:
        parts = zip(sparse, of_unseen, of_all, right.chunk(2), strict=True)
        return sum(
            (torch.sparse.mm(m, x) + u[:, None] * (v @ x) for m, u, v, x in parts),
            start=torch.zeros(count, right.shape[1], dtype=torch.float64),
        )

    def transposed(left: Tensor) -> Tensor:
        parts = zip(sparse, of_unseen, of_all, strict=True)
        return torch.cat(
            [torch.sparse.mm(m.t(), left) + v[:, None] * (u @ left) for m, u, v in parts]
        )

    generator = named_generator(0, "bit codes")
    shape = (2 * count, min(_WIDTH, count))
    basis = product(torch.randn(shape, generator=generator, dtype=torch.float64))
    for _ in range(_POWER_STEPS):
        basis = product(torch.linalg.qr(transposed(torch.linalg.qr(basis).Q)).Q)
    basis = torch.linalg.qr(basis).Q
    left, size, _ = torch.linalg.svd(transposed(basis).T, full_matrices=False)
    return basis @ left * size / root[:, None]


def _split(
    bits: Tensor,
    place: int,
    tokens: Int[Tensor, " tokens"],
    directions: Float64[Tensor, "all directions"],
    weight: Float64[Tensor, " all"],
) -> None:
    """Give `tokens` their bits from `place` on: two halves, each then by itself."""
    if len(tokens) == 1:
        return
    held, share = directions[tokens], weight[tokens] / weight[tokens].sum()
    around = held - share @ held
    axis = torch.linalg.eigh(around.T @ (share[:, None] * around)).eigenvectors[:, -1]
    # Which end is first must not hang on a library's sign.
    axis = axis * axis[axis.abs().argmax()].sign()
    order = (around @ axis).argsort(stable=True)
    tokens, share = tokens[order], share[order]
    most = 1 << (bits.shape[1] - place - 1)  # tokens that the bits after this one tell apart
    low, high = max(1, len(tokens) - most), min(most, len(tokens) - 1)
    cut = int((share.cumsum(0) - 0.5).abs().argmin()) + 1
    cut = min(max(cut, low), high)
    bits[tokens[cut:], place] = -1
    for half in (tokens[:cut], tokens[cut:]):
        _split(bits, place + 1, half, directions, weight)

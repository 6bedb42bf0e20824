"""log p(x) of rows of tokens under a checkpoint of any family, in memory (method, section 7).

family   what is found
AR       log p(x), exact
Cola     a lower bound of it, the ELBO, by K draws of latents and noise levels; with method=ode an
         estimate of it and of IWAE's, which is closer, by K draws of latents
LLaDA    a lower bound of it by K draws of which tokens are masked
"""

import dataclasses
from collections.abc import Iterator, Sequence, Set

import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import require
from cola_train.families.checkpoint import Checkpoint
from cola_train.likelihood.importance import LogWeights, elbo, iwae
from cola_train.likelihood.rows import Draw, Estimator, ScoredRow, batches

_NUM_PARTS = 3  # of a draw's log w, where latents are drawn


@dataclasses.dataclass(frozen=True)
class RowLikelihood:
    """log p(x) of one row, or of its tokens after those that are given, in nats.

    Attributes:
        num_tokens: tokens that it is the likelihood of.
        log_p: exact of AR; of LLaDA its bound, of Cola the ELBO, both by draws. With given tokens,
            Cola's is the difference of two ELBOs, not a bound itself.
        standard_error: of log_p over the K draws; 0 where exact, None with one draw. Of Cola's
            bound it is rather too wide: its levels are stratified over the draws.
        iwae: IWAE's estimate, or a difference of two; None but of method=ode.
        reconstruction, prior, entropy: the means of log p(x | z_0), log p(z_0) and -log q(z_0 | x),
            which add up to log_p; None of the baselines.
        step_change: what twice as many steps of the solver add to log_p; None where no solver with
            a number of steps found it.
    """

    num_tokens: int
    log_p: float
    standard_error: float | None
    iwae: float | None = None
    reconstruction: float | None = None
    prior: float | None = None
    entropy: float | None = None
    step_change: float | None = None


def log_likelihoods(
    checkpoint: Checkpoint, rows: Sequence[ScoredRow], config: LikelihoodConfig
) -> list[RowLikelihood]:
    """The likelihood of each row, in order; see `log_likelihoods_stream`."""
    found = dict(log_likelihoods_stream(checkpoint, rows, config))
    return [found[number] for number in range(len(rows))]


def log_likelihoods_stream(
    checkpoint: Checkpoint,
    rows: Sequence[ScoredRow],
    config: LikelihoodConfig,
    done: Set[int] = frozenset(),
) -> Iterator[tuple[int, RowLikelihood]]:
    """(place in `rows`, its likelihood) as soon as it is known, the longest rows first.

    Places that are `done` are left out; the others have the batches that they have without it. A
    row's result depends on the checkpoint, the row with its key and the settings; on its batch
    only by rounding and, with dopri5, within that solver's tolerance.

    Raises:
        UserError: a VAE without a DiT, a row without a token to score, an id outside the
            vocabulary, or as of `solve`.
    """
    _check(checkpoint, rows)
    places: dict[tuple[object, ...], int] = {}
    wanted: list[ScoredRow] = []

    def place_of(row: ScoredRow) -> int:
        documents = None if row.documents is None else tuple(row.documents)
        identity = (tuple(row.tokens), row.key, row.given, documents)
        if identity not in places:
            places[identity] = len(wanted)
            wanted.append(row)
        return places[identity]

    # Latents are drawn for a whole text: what follows a given part is the whole less that part.
    needed: list[list[int]] = []
    for row in rows:
        parts = [row]
        if checkpoint.likelihood_kind == "ELBO" and row.given:
            documents = None if row.documents is None else row.documents[: row.given]
            given_part = ScoredRow(row.tokens[: row.given], row.key, documents)
            parts = [dataclasses.replace(row, given=0), given_part]
        needed.append([place_of(part) for part in parts])
    estimator = checkpoint.likelihood(wanted, config)
    draws_of: dict[int, list[Tensor]] = {}
    waiting = set(range(len(rows))) - done
    lacking = {place for number in waiting for place in needed[number]}
    widths = [estimator.width(place) for place in range(len(wanted))]
    for batch in batches(widths, estimator.num_draws, config.batch_size):
        if lacking.isdisjoint(draw.row for draw in batch):
            continue
        for draw, terms in zip(batch, _terms(estimator, batch), strict=True):
            draws_of.setdefault(draw.row, []).append(terms)
        complete = {place for place, found in draws_of.items() if len(found) == estimator.num_draws}
        for number in sorted(waiting):
            if complete.issuperset(needed[number]):
                waiting.discard(number)
                draws = [torch.stack(draws_of[place]) for place in needed[number]]
                yield number, _result(checkpoint, config, rows[number], *draws)


def conditional_scores(
    checkpoint: Checkpoint,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    config: LikelihoodConfig,
    keys: Sequence[int],
) -> list[float]:
    """log p(continuation | prompt) of each pair of ids, nats, in order.

    AR: exact. LLaDA: its bound with the prompt never masked. Cola: the ELBO of prompt and
    continuation less that of the prompt on the same draws, so that of what they share only the
    continuation's influence stays. It is no bound, but options of one prompt are compared by the
    bound of each whole: the prompt's is the same for all. With method=ode a score depends on what
    fills up the last block, so that options of different length cannot be compared.

    Args:
        checkpoint, config: of any family; K, the solver and so on.
        pairs: (prompt, continuation); a prompt may be empty, a continuation may not.
        keys: addresses of the draws, in [0, 2^63), one a pair. Give the options of one question the
            same key: they are then compared on the same draws, and their prompt is computed once.

    Raises:
        UserError: as `log_likelihoods`.
    """
    rows = [
        ScoredRow([*prompt, *continuation], key, given=len(prompt))
        for (prompt, continuation), key in zip(pairs, keys, strict=True)
    ]
    return [found.log_p for found in log_likelihoods(checkpoint, rows, config)]


@torch.no_grad()
def _terms(estimator: Estimator, batch: Sequence[Draw]) -> Float64[Tensor, "draws terms"]:
    """The terms that add up to log w of each draw, and a step change behind them, on the CPU."""
    found = estimator(batch)
    if not isinstance(found, LogWeights):
        return found[:, None].cpu()
    parts = [found.reconstruction, found.prior, found.entropy]
    if found.step_change is not None:
        parts.append(found.step_change)
    return torch.stack(parts, dim=1).cpu()


def _result(
    checkpoint: Checkpoint,
    config: LikelihoodConfig,
    row: ScoredRow,
    draws: Float64[Tensor, "draws terms"],
    subtracted: Float64[Tensor, "draws terms"] | None = None,
) -> RowLikelihood:
    terms = draws if subtracted is None else draws - subtracted
    parts, num_tokens = terms[:, :_NUM_PARTS], _num_scored(checkpoint, row)
    log_w, num_draws = parts.sum(1), len(terms)
    error = None if num_draws == 1 else float(log_w.std() / num_draws**0.5)
    if checkpoint.likelihood_kind == "exact":
        error = 0.0
    if parts.shape[1] == 1:
        return RowLikelihood(num_tokens, float(elbo(log_w)), error)
    closer = None
    if config.method == "ode":
        closer = float(iwae(draws[:, :_NUM_PARTS].sum(1)))
        if subtracted is not None:
            closer -= float(iwae(subtracted[:, :_NUM_PARTS].sum(1)))
    changes = terms[:, _NUM_PARTS:].mean(0).tolist()
    return RowLikelihood(
        num_tokens,
        float(elbo(log_w)),
        error,
        closer,
        *parts.mean(0).tolist(),
        *changes,
    )


def _num_scored(checkpoint: Checkpoint, row: ScoredRow) -> int:
    return sum(token != checkpoint.tokenizer.pad_token_id for token in row.tokens[row.given :])


def _check(checkpoint: Checkpoint, rows: Sequence[ScoredRow]) -> None:
    vocab_size = checkpoint.vocab_size
    for number, row in enumerate(rows):
        require(
            _num_scored(checkpoint, row) > 0,
            f"Row {number} has no token to score: give it at least one that is not padding"
            f"{' after the given ones' if row.given else ''}.",
        )
        bad = next((token for token in row.tokens if not 0 <= token < vocab_size), None)
        require(
            bad is None,
            f"Row {number} has id {bad}, outside the vocabulary, 0..{vocab_size - 1}; "
            "encode it with the checkpoint's own tokenizer.",
        )
        require(
            0 <= row.key < 2**63,
            f"Row {number} has key {row.key}; keys address random draws and must be in [0, 2^63).",
        )

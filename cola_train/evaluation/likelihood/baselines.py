"""The baselines' log p(x): exact for the autoregressive model, a bound for masked diffusion."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.baseline_format import BaselineCheckpoint
from cola_train.config.likelihood import LikelihoodConfig
from cola_train.evaluation.likelihood.rows import Draw, Row, draws_at
from cola_train.models.transformer import Transformer
from cola_train.objectives.losses import token_nats
from cola_train.randomness import Purpose, uniform


class NextTokenLikelihood:
    """log p(x) of the autoregressive model, exact: the sum over tokens of log p(x_i | x_<i).

    A row, and with documents apart each of its documents, begins after the end-of-text token, as sampling begins it: so its first
    token is scored too, and the same tokens as with other families.
    """

    num_draws, exact = 1, True

    def __init__(self, checkpoint: BaselineCheckpoint, rows: Sequence[Row]) -> None:
        """`rows` are not empty."""
        self.transformer, tokenizer = checkpoint.transformer, checkpoint.tokenizer
        self.rows = rows
        self.sequences = [_after_separators(row, tokenizer.eos_token_id, tokenizer.pad_token_id) for row in rows]

    def width(self, row: int) -> int:
        """Tokens of a row with the separators before it."""
        return len(self.sequences[row])

    def __call__(self, draws: Sequence[Draw]) -> Float64[Tensor, " draws"]:
        """log p of rows of one width, nats."""
        device = self.transformer.lm_head.weight.device
        places = torch.tensor([self.sequences[draw.row] for draw in draws], device=device)  # (draws, width, 3)
        tokens, document, scored = places.unbind(-1)
        apart = any(self.rows[draw.row].documents is not None for draw in draws)
        hidden = self.transformer(tokens, document if apart else None)
        nats = _row_nats(self.transformer, hidden[:, :-1], tokens[:, 1:])
        return -(nats * scored[:, 1:]).sum(1)


class MaskedDiffusionBound:
    """A lower bound of log p(x) of the masked diffusion model (LLaDA), by draws of which tokens are masked.

    The bound is -E[(1/t) sum over masked tokens of -log p(x_i | x_t)] over t uniform in (0, 1] and masks of probability t, the
    training loss (`MaskedDiffusionObjective`) without its min_mask_prob. Here t is integrated out: given that l of the row's L
    tokens are masked, the mean weight is L / l with l uniform in 1..L, and the masked tokens are any l of them (LLaDA, equation 6).
    That has the same mean and less variance. Tokens that are given are never masked.
    """

    exact = False

    def __init__(self, checkpoint: BaselineCheckpoint, rows: Sequence[Row], config: LikelihoodConfig) -> None:
        """`rows` are not empty."""
        self.transformer, self.config, self.rows = checkpoint.transformer, config, rows
        self.pad_token_id = checkpoint.tokenizer.pad_token_id
        self.num_draws = config.num_samples

    def width(self, row: int) -> int:
        """Tokens of a row."""
        return len(self.rows[row].tokens)

    def __call__(self, draws: Sequence[Draw]) -> Float64[Tensor, " draws"]:
        """The bound's estimate from each draw, of rows of one width, nats."""
        transformer, seed = self.transformer, self.config.seed
        device = transformer.lm_head.weight.device
        rows = [self.rows[draw.row] for draw in draws]
        tokens = torch.tensor([list(row.tokens) for row in rows], device=device)
        place = torch.arange(tokens.shape[1], device=device)
        given = torch.tensor([row.given for row in rows], device=device)
        scored = (tokens != self.pad_token_id) & (place >= given[:, None])
        length = scored.sum(1)
        share = draws_at(uniform, seed, Purpose.DIFFUSION_TIME, self.rows, draws, 1, device)[:, 0]
        num_masked = 1 + (share * length).long().clamp(max=length - 1)
        order = draws_at(uniform, seed, Purpose.DIFFUSION_MASK, self.rows, draws, tokens.shape[1], device)
        rank = (order + (~scored).float()).argsort(dim=1, stable=True).argsort(dim=1)
        masked = rank < num_masked[:, None]
        document = None
        if any(row.documents is not None for row in rows):
            document = torch.tensor([list(row.documents or [0] * len(row.tokens)) for row in rows], device=device)
        hidden = transformer(torch.where(masked, transformer.mask_token_id, tokens), document)
        nats = (_row_nats(transformer, hidden, tokens) * masked).sum(1)
        return -nats * length / num_masked


def _row_nats(transformer: Transformer, hidden: Tensor, targets: Tensor) -> Float64[Tensor, "draws seq"]:
    # Row by row: the logits of a batch over a real vocabulary would be gigabytes.
    rows = [token_nats(transformer.head(hidden[i : i + 1]), targets[i : i + 1]) for i in range(len(hidden))]
    return torch.cat(rows).double()


def _after_separators(row: Row, eos: int, pad: int) -> list[tuple[int, int, bool]]:
    """Each place of the row as the network reads it: token, document, whether it is scored."""
    documents = row.documents or [0] * len(row.tokens)
    places: list[tuple[int, int, bool]] = []
    for number, (token, document) in enumerate(zip(row.tokens, documents, strict=True)):
        if not places or document != places[-1][1]:
            places.append((eos, document, False))
        places.append((token, document, number >= row.given and token != pad))
    return places

"""A lower bound of log p(x) of the masked diffusion model."""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.transformer.nats import row_nats
from cola_train.likelihood.rows import Draw, ScoredRow, draws_at
from cola_train.models.transformer import Transformer
from cola_train.randomness import Purpose, uniform


class MaskedDiffusionBound:
    """A lower bound of log p(x) under LLaDA, from draws of which tokens are masked.

    The bound is -E[(1/t) sum over masked tokens of -log p(x_i | x_t)] over t uniform in (0, 1] and
    masks of probability t, the training loss (`MaskedDiffusionObjective`) without its
    min_mask_prob. Here t is integrated out: given that l of the row's L tokens are masked, the mean
    weight is L / l with l uniform in 1..L, and the masked tokens are any l of them (LLaDA, equation
    6). That has the same mean and less variance. Tokens that are given are never masked. `rows` are
    not empty.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer,
        rows: Sequence[ScoredRow],
        config: LikelihoodConfig,
    ) -> None:
        self.transformer, self.config, self.rows = transformer, config, rows
        self.pad_token_id = tokenizer.pad_token_id
        self.num_draws = config.num_samples

    def width(self, row: int) -> int:
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
        order = draws_at(
            uniform, seed, Purpose.DIFFUSION_MASK, self.rows, draws, tokens.shape[1], device
        )
        rank = (order + (~scored).float()).argsort(dim=1, stable=True).argsort(dim=1)
        masked = rank < num_masked[:, None]
        document = None
        if any(row.documents is not None for row in rows):
            document = torch.tensor(
                [list(row.documents or [0] * len(row.tokens)) for row in rows], device=device
            )
        hidden = transformer(torch.where(masked, transformer.mask_token_id, tokens), document)
        nats = (row_nats(transformer, hidden, tokens) * masked).sum(1)
        return -nats * length / num_masked

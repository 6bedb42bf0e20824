"""The interface of what estimates log p(x) of rows of tokens, or a bound; each family has one."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Float64
from torch import Tensor

from cola_train.likelihood.importance import LogWeights
from cola_train.likelihood.rows import Draw

LikelihoodKind = Literal["exact", "bound", "ELBO"]
"""log p itself; draws whose mean bounds it; or importance weights of latents, of which the mean of
logs and the log of means bound it.
"""


@runtime_checkable
class Estimator(Protocol):
    """log p of the rows that it was made for, or `num_draws` draws of each that bound it."""

    num_draws: int

    def width(self, row: int) -> int:
        """Tokens that the row at index `row` is computed with; a call's draws have one width."""

    def __call__(self, draws: Sequence[Draw]) -> LogWeights | Float64[Tensor, " draws"]:
        """log w in its parts, or log p, of each draw, nats."""

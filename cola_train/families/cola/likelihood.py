"""Cola DLM's log weights of rows: importance sampling from the encoder, the prior by its ODE."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.cola.prior_density import block_log_densities
from cola_train.likelihood.importance import LogWeights, log_weights
from cola_train.likelihood.rows import Draw, ScoredRow, draws_at
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.vocabulary_head import token_nats
from cola_train.randomness import Purpose, normal, uniform


class LatentWeights:
    """log w of draws of z_0 ~ q(z_0 | x) for rows x of any length.

    A row that does not fill its last block of latents is filled up with end-of-text tokens. For the
    filled row x' the weight is p(x | z_0) p(z_0) / q(z_0 | x'): the decoder's terms are those of
    the row's own tokens, since any others integrate to 1. As q(z_0 | x') is positive everywhere the
    mean of w is p(x) *whatever* a row is filled with, and the bounds hold; they are the tighter,
    the likelier the filling's latents are after the row's own. Those of padding are not likely at
    all: docs/likelihood.md.
    """

    def __init__(
        self,
        vae: TextVAE,
        dit: BlockCausalDiT,
        tokenizer: Tokenizer,
        rows: Sequence[ScoredRow],
        config: LikelihoodConfig,
    ) -> None:
        """Fill `rows`, of which none is empty or has tokens that are given."""
        self.vae, self.dit, self.config = vae, dit, config
        self.pad_token_id, self.num_draws = tokenizer.pad_token_id, config.num_samples
        self.rows = rows
        block = self.vae.config.patch_size * self.dit.config.block_size
        eos = tokenizer.eos_token_id
        self.filled = [[*row.tokens, *[eos] * (-len(row.tokens) % block)] for row in rows]

    def width(self, row: int) -> int:
        """Tokens of a row with its filling."""
        return len(self.filled[row])

    def __call__(self, draws: Sequence[Draw]) -> LogWeights:
        """The weights of `draws`, all of one width."""
        vae, config = self.vae, self.config
        device = vae.decoder.in_layer.weight.device
        tokens = torch.tensor([self.filled[draw.row] for draw in draws], device=device)
        scored = torch.tensor([self._scored(draw.row) for draw in draws], device=device)
        document = self._documents(draws, device)
        posterior = vae.encode(tokens, document)
        shape = posterior.mean.shape[1:]

        def drawn(kind: Callable[..., Tensor], purpose: Purpose) -> Tensor:
            count = shape.numel()
            flat = draws_at(kind, config.seed, purpose, self.rows, draws, count, device)
            return flat.unflatten(1, shape)

        eps, probe = drawn(normal, Purpose.LIKELIHOOD_EPS), None
        if config.divergence == "hutchinson":
            # Of all probes of independent coordinates, signs have the least variance: what the
            # diagonal adds is exact.
            probe = torch.where(drawn(uniform, Purpose.LIKELIHOOD_PROBE) < 0.5, -1.0, 1.0)

        def log_likelihood(z_0: Float[Tensor, "draws latents channels"]) -> Tensor:
            hidden = vae.decoder(z_0, document)
            # Row by row: the logits of a batch over a real vocabulary would be gigabytes.
            nats = [
                token_nats(vae.decoder.head(hidden[i : i + 1]), tokens[i : i + 1])
                for i in range(len(draws))
            ]
            return -(torch.cat(nats).double() * scored).sum(1)

        def log_prior(z_0: Float[Tensor, "draws latents channels"]) -> Tensor:
            return block_log_densities(self.dit, z_0, config, document, probe).sum(1)

        return log_weights(posterior, eps, log_likelihood, log_prior)

    def _scored(self, row: int) -> list[bool]:
        own = self.rows[row].tokens
        return [
            place < len(own) and token != self.pad_token_id
            for place, token in enumerate(self.filled[row])
        ]

    def _documents(
        self, draws: Sequence[Draw], device: torch.device
    ) -> Int[Tensor, "draws latents"] | None:
        """The document of each latent; a filling belongs to the last one."""
        documents = [self.rows[draw.row].documents for draw in draws]
        if all(numbers is None for numbers in documents):
            return None
        width, patch_size = self.width(draws[0].row), self.vae.config.patch_size
        filled = []
        for numbers in documents:
            own = numbers or [0]
            filled.append([*own, *[own[-1]] * width][:width:patch_size])
        return torch.tensor(filled, device=device)

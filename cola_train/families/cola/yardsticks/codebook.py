"""Codes are read off posterior means: a tally of them, by token."""

import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from cola_train.models.text_vae import Posterior


class CodeTally:
    """Adds up posterior means by token, in fp64: the order of batches is not seen."""

    def __init__(self, num_tokens: int, channels: int) -> None:
        self.count = torch.zeros(num_tokens, dtype=torch.float64)
        self.sum = torch.zeros(num_tokens, channels, dtype=torch.float64)
        # over all tokens: of squared means, and of the posterior's variances
        self.square, self.noise = torch.zeros(2, channels, dtype=torch.float64)

    def add(
        self,
        tokens: Int[Tensor, "rows seq"],
        posterior: Posterior,
        counted: Bool[Tensor, "rows seq"],
    ) -> None:
        """Add the latents of `tokens`, one each, where `counted`."""
        ids = tokens[counted].cpu()
        mean = posterior.mean[counted].double().cpu()
        self.count += torch.bincount(ids, minlength=len(self.count))
        self.sum.index_add_(0, ids, mean)
        self.square += mean.square().sum(0)
        self.noise += posterior.logvar[counted].double().exp().sum(0).cpu()

    @property
    def codes(self) -> Float64[Tensor, "codes channels"]:
        """The mean of each token's posterior means; 0 for a token that was not seen."""
        return self.sum / self.count.clamp(min=1)[:, None]

    @property
    def within(self) -> Float64[Tensor, " channels"]:
        """The variance of posterior means around their token's code, pooled over tokens."""
        around = self.square - (self.count[:, None] * self.codes.square()).sum(0)
        # A token that was seen once is its own code and tells nothing.
        freedom = self.count.sum() - (self.count > 0).sum()
        return around.clamp(min=0) / freedom.clamp(min=1)

    @property
    def posterior(self) -> Float64[Tensor, " channels"]:
        """The mean variance of the posterior."""
        return self.noise / self.count.sum().clamp(min=1)

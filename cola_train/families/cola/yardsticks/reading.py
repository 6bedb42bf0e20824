"""Codebook and token statistics, read off a VAE and the training rows."""

import dataclasses

import torch
from jaxtyping import Int
from torch import Tensor

from cola_train.data.batch import training_batches
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.yardsticks.codebook import CodeTally
from cola_train.likelihood.token_tables import BigramModel, count_pairs, spread, training_rows
from cola_train.models.codebook import Codebook
from cola_train.models.text_vae import TextVAE
from cola_train.objectives.objective import documents_of

# Codes are means of a token's latents, which differ little: more rows hardly move them.
_MOST_CODE_ROWS = 1024


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What yardsticks know, and from how much of the training rows.

    Attributes:
        codebook: on the VAE's device, as is `bigram`.
        num_rows: training rows whose tokens were counted.
        num_code_rows: those of them that codes were read off.
        num_unseen: tokens of the vocabulary that none of these has.
        within_variance: of a token's posterior means around its code, a mean over channels.
        posterior_variance: of the posterior, likewise; S is the sum of both.
    """

    codebook: Codebook
    bigram: BigramModel
    num_rows: int
    num_code_rows: int
    num_unseen: int
    within_variance: float
    posterior_variance: float


def read_statistics(
    vae: TextVAE,
    data: PreparedData,
    most_rows: int | None,
    batch_size: int,
    mask_documents: bool,
    fixed_log_snr: float | None = None,
) -> Statistics:
    """Count tokens of `most_rows` training rows, evenly spread, and read codes off some of them.

    `vae` has patch size 1: codes of tuples of tokens are too many. `batch_size` is of its passes;
    with `mask_documents` nothing is known across documents, and with `fixed_log_snr` the posterior
    has that logSNR instead of its own.
    """
    rows, vocab_size = training_rows(data, most_rows), vae.config.vocab_size
    pairs = count_pairs(data, rows, vocab_size, mask_documents)
    code_rows = spread(rows, _MOST_CODE_ROWS)
    device = vae.encoder.final_layer.weight.device
    tally = CodeTally(vocab_size, vae.config.latent_dim)
    for batch in training_batches(data, code_rows, batch_size):
        documents = documents_of(batch, 1, mask_documents)
        documents = None if documents is None else documents.to(device)
        posterior = vae.encode(batch.tokens.to(device), documents)
        if fixed_log_snr is not None:
            posterior = posterior.with_log_snr(fixed_log_snr)
        tally.add(batch.tokens, posterior, batch.loss_mask)
    dtype, variance = torch.float32, tally.within + tally.posterior
    codes, unseen = tally.codes, (tally.count == 0).nonzero()[:, 0]
    codes[unseen] = _codes_alone(vae, unseen, data.manifest.seq_len, batch_size)
    return Statistics(
        Codebook(codes, pairs.unigram().log(), variance).to(device, dtype),
        BigramModel.of(pairs, device, dtype),
        num_rows=len(rows),
        num_code_rows=len(code_rows),
        num_unseen=len(unseen),
        within_variance=float(tally.within.mean()),
        posterior_variance=float(tally.posterior.mean()),
    )


def _codes_alone(
    vae: TextVAE, tokens: Int[Tensor, " tokens"], seq_len: int, batch_size: int
) -> Tensor:
    """Posterior means of tokens in rows of nothing else: codes of those that training rows lack."""
    rows = torch.zeros(-(-len(tokens) // seq_len) * seq_len, dtype=torch.int64)
    rows[: len(tokens)] = tokens
    codes = torch.zeros(len(rows), vae.config.latent_dim, dtype=torch.float64)
    device, at_once = vae.encoder.final_layer.weight.device, batch_size * seq_len
    for first in range(0, len(rows), at_once):
        part = rows[first : first + at_once].view(-1, seq_len)
        mean = vae.encode(part.to(device)).mean.flatten(0, 1)
        codes[first : first + at_once] = mean.double().cpu()
    return codes[: len(tokens)]

"""What is read off training rows and a VAE whose codes are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cola_train.data.batch import training_batches
from cola_train.data.packing import TRAIN
from cola_train.data.prepared import PreparedData
from cola_train.families.cola.yardsticks.reading import (
    Statistics,
    read_statistics,
)
from cola_train.models.text_vae import Posterior, TextVAE
from tests.helpers.tiny import random_latents, tiny_vae

CHANNELS, SPREAD, NOISE = 3, 0.05, 0.04


@pytest.fixture(scope="module")
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


def known_vae(codes: Tensor) -> TextVAE:
    """Gives each token its code, moved by what a sine makes of its place."""

    def encode(tokens: Tensor, document: Tensor | None = None) -> Posterior:
        moved = torch.sin(1e4 * torch.arange(tokens.numel() * CHANNELS)).view(*tokens.shape, -1)
        mean = codes[tokens] + SPREAD * 2**0.5 * moved
        return Posterior(mean, torch.full_like(mean, NOISE).log())

    vae: Any = tiny_vae(latent_dim=CHANNELS, vocab_size=len(codes))
    vae.encode = encode
    return vae


def read(data: PreparedData, codes: Tensor, most: int | None) -> Statistics:
    return read_statistics(known_vae(codes), data, most, batch_size=5, mask_documents=False)


def test_the_codes_of_a_known_vae_are_found_for_every_token(data: PreparedData) -> None:
    codes = random_latents(data.manifest.vocab_size, CHANNELS, seed=2)
    known = read(data, codes, None)
    number, vocab_size = data.num_rows(TRAIN), data.manifest.vocab_size
    rows = [data.row(TRAIN, row)[0] for row in range(number)]
    count = np.bincount(np.concatenate(rows), minlength=vocab_size)
    count[data.manifest.pad_token_id] = 0
    some = np.concatenate([rows[place * number // 1024] for place in range(1024)])
    seen = np.setdiff1d(some, [data.manifest.pad_token_id])
    assert (known.num_rows, known.num_code_rows) == (number, 1024)
    assert 0 < known.num_unseen == vocab_size - len(seen)
    # Also of tokens that no row has; at most SPREAD sqrt(2) away.
    assert (known.codebook.codes - codes).abs().max() < 1.01 * SPREAD * 2**0.5
    often = torch.from_numpy(count > 100)
    assert (known.codebook.codes - codes)[often].abs().max() < 5 * SPREAD / 10
    assert known.within_variance == pytest.approx(SPREAD**2, rel=0.05)
    assert known.posterior_variance == pytest.approx(NOISE, rel=1e-5)
    assert known.codebook.variance.tolist() == pytest.approx(
        [NOISE + SPREAD**2] * CHANNELS, rel=0.1
    )
    expected = np.log((count + 0.5) / (count + 0.5).sum())
    assert np.allclose(known.codebook.log_p.numpy(), expected, atol=1e-5)
    assert np.allclose(known.bigram.p.numpy(), np.exp(expected), rtol=1e-5)


def test_no_more_rows_are_read_than_was_asked_for_and_these_are_spread(data: PreparedData) -> None:
    codes = random_latents(data.manifest.vocab_size, CHANNELS, seed=2)
    known = read(data, codes, 3)
    assert (known.num_rows, known.num_code_rows) == (3, 3)
    number = data.num_rows(TRAIN)
    rows = [0, number // 3, 2 * number // 3]
    (batch,) = training_batches(data, rows)
    assert batch.row_index.tolist() == rows
    ids = batch.tokens[batch.loss_mask]
    expected = torch.bincount(ids, minlength=data.manifest.vocab_size) + 0.5
    assert torch.allclose(known.bigram.p, (expected / expected.sum()).float())

"""Batches whose rows have padding, several documents and, in most seeds, prompt blocks."""

import pytest
import torch

from cola_train.data.datamodule import Batch
from tests.helpers.tiny import make_batch, random_tokens

SEQ_LEN = 24


@pytest.fixture
def six_rows() -> Batch:
    """Padding of several lengths, one row of padding alone; documents that start on multiples of 8 tokens."""
    starts = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 0], [0, 1, 2], [0, 1, 2], [0, 0, 1]])
    documents = starts.repeat_interleave(8, dim=1)
    return make_batch(random_tokens(6, SEQ_LEN, seed=90), [0, 3, SEQ_LEN, 10, 0, 1], documents)

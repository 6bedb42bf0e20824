"""Wrong shapes and types of tensors fail in tests, whatever the arithmetic would make of them."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from cola_train.flow import interpolate
from cola_train.models.text_vae import Posterior


def test_a_shape_that_disagrees_with_another_is_refused() -> None:
    noised, clean = torch.zeros(2, 3, 4), torch.zeros(1, 3, 4)
    with pytest.raises(BeartypeCallHintViolation):
        interpolate(noised, clean, torch.zeros(2))


def test_a_type_that_is_not_the_annotated_one_is_refused() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        interpolate(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))


def test_fields_of_a_dataclass_that_disagree_are_refused() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        Posterior(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5))

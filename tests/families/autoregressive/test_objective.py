"""The AR baseline's loss: one prefix at a time by hand, and the same whatever the micro-batches."""

import pytest
import torch

from cola_train.data.batch import Batch
from cola_train.families.autoregressive.family import AutoregressiveConfig
from cola_train.families.autoregressive.objective import AutoregressiveObjective
from tests.helpers.compare import assert_near, number
from tests.helpers.llama import tiny_transformer
from tests.helpers.losses import losses_of
from tests.helpers.partition import added_up, assert_same_step
from tests.helpers.tiny import rows_of


def objective_of(mask_documents: bool) -> AutoregressiveObjective:
    network = tiny_transformer(causal=True, seed=4).requires_grad_(True)
    return AutoregressiveObjective(network, AutoregressiveConfig(mask_documents=mask_documents))


@pytest.mark.parametrize("mask_documents", [False, True])
def test_each_real_token_is_predicted_from_what_precedes_it(
    six_rows: Batch, mask_documents: bool
) -> None:
    objective = objective_of(mask_documents)
    nats, right, predicted = 0.0, 0, 0
    for tokens, real, document in zip(
        six_rows.tokens, six_rows.loss_mask, six_rows.document_ids, strict=True
    ):
        for place in range(1, len(tokens)):
            start = int((document == document[place]).nonzero()[0]) if mask_documents else 0
            if not real[place] or start == place:
                continue
            with torch.no_grad():
                hidden = objective.transformer(tokens[None, start:place])[0, -1]
                logits = objective.transformer.head(hidden).double()
            nats += number(logits.logsumexp(0) - logits[tokens[place]])
            right += int(logits.argmax() == tokens[place])
            predicted += 1
    losses = losses_of(objective, six_rows)
    assert {name: int(count) for name, count in objective.counts(six_rows).items()} == {
        "predicted_tokens": predicted
    }
    assert_near(losses.terms["next_token_nats_per_token"], torch.tensor(nats / predicted))
    assert_near(losses.metrics["next_token_accuracy"], torch.tensor(right / predicted))
    assert number(losses.total) == number(losses.terms["next_token_nats_per_token"])
    assert 0 < right < predicted


def test_documents_change_what_is_counted(six_rows: Batch) -> None:
    apart, together = (
        int(objective_of(mask).counts(six_rows)["predicted_tokens"]) for mask in (True, False)
    )
    # Of the fixture's rows, these documents after the first have a real first token: 1, 1, 0, 1, 2,
    # 1.
    assert together - apart == 6


def test_the_head_runs_only_where_a_token_is_predicted(six_rows: Batch) -> None:
    objective, seen = objective_of(mask_documents=False), []
    objective.transformer.lm_head.register_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape))
    )
    losses_of(objective, six_rows)
    assert seen == [(6, 23, 16)]


@pytest.mark.parametrize("mask_documents", [False, True])
def test_micro_batches_add_up_to_the_step(six_rows: Batch, mask_documents: bool) -> None:
    objective = objective_of(mask_documents)
    whole = added_up(objective, six_rows, 6)
    assert len(whole[1]) == len(list(objective.parameters()))
    for rows_each in (1, 2, 3):
        assert_same_step(added_up(objective, six_rows, rows_each), whole)


def test_padding_alone_gives_zero_losses_and_no_gradient(six_rows: Batch) -> None:
    objective = objective_of(mask_documents=False)
    losses = losses_of(objective, rows_of(six_rows, slice(2, 3)))
    losses.total.backward()
    assert all(number(value) == 0 for value in losses.values().values())
    assert not any(
        parameter.grad.any() for parameter in objective.parameters() if parameter.grad is not None
    )

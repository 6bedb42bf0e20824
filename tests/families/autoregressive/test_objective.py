"""The AR baseline's loss: one prefix at a time by hand, and the same whatever the micro-batches."""

import math
import random

import pytest
import torch

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.batch import Batch
from cola_train.evaluation.likelihood.likelihood import log_likelihoods
from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.autoregressive.family import AutoregressiveConfig
from cola_train.families.autoregressive.objective import AutoregressiveObjective
from cola_train.families.generate import generate
from cola_train.likelihood.rows import ScoredRow
from tests.helpers.compare import assert_near, number
from tests.helpers.llama import tiny_transformer
from tests.helpers.losses import losses_of
from tests.helpers.partition import added_up, assert_same_step
from tests.helpers.tiny import PAD, rows_of, tiny_tokenizer

EOS = 0


def objective_of(mask_documents: bool) -> AutoregressiveObjective:
    network = tiny_transformer(causal=True, seed=4).requires_grad_(True)
    return AutoregressiveObjective(network, AutoregressiveConfig(mask_documents=mask_documents))


def rows_of_documents(
    rows: int, seq: int, alignment: int = 1, first: int | None = None, seed: int = 6
) -> Batch:
    """A stream of documents, each ended by EOS and padded to `alignment`, cut into rows; they have
    3 to 9 tokens, of which the first is `first`, if given.
    """
    draw = random.Random(seed)
    ids: list[int] = []
    starts: list[int] = []
    while len(ids) < rows * seq:
        starts.append(len(ids))
        text = [draw.randrange(4, 29) for _ in range(draw.randint(2, 8))]
        ids += [text[0] if first is None else first, *text[1:], EOS]
        ids += [PAD] * (-len(ids) % alignment)
    tokens = torch.tensor(ids[: rows * seq]).view(rows, seq)
    begins = torch.zeros(rows * seq, dtype=torch.long)
    begins[[start for start in starts if start < rows * seq]] = 1
    number = begins.view(rows, seq).cumsum(1)
    index = torch.arange(rows)
    return Batch(tokens, tokens != PAD, number - number[:, :1], index, index)


def test_each_real_token_is_predicted_from_what_precedes_it_in_the_row(six_rows: Batch) -> None:
    compare_by_hand(six_rows, mask_documents=False)


@pytest.mark.parametrize(("seq", "alignment"), [(24, 1), (24, 8), (9, 1), (8, 8), (5, 1)])
def test_documents_apart_begin_after_a_separator(seq: int, alignment: int) -> None:
    batch = rows_of_documents(12, seq, alignment)
    compare_by_hand(batch, mask_documents=True)
    shows = [EOS in row[:-1] or PAD in row for row in batch.tokens.tolist()]
    # The cases that differ occur: rows that show a separator, and in short rows some that do not.
    assert any(shows)
    assert all(shows) == (seq == 24)


def compare_by_hand(batch: Batch, mask_documents: bool) -> None:
    """One prefix at a time."""
    objective = objective_of(mask_documents)
    nats, right, predicted = 0.0, 0, 0
    for tokens, real, document in zip(
        batch.tokens, batch.loss_mask, batch.document_ids, strict=True
    ):
        for place in range(len(tokens)):
            start = int((document == document[place]).nonzero()[0]) if mask_documents else 0
            prefix = tokens[start:place]
            if mask_documents and (EOS in tokens[:-1] or PAD in tokens):
                prefix = torch.cat([torch.tensor([EOS]), prefix])
            if not real[place] or not len(prefix):
                continue
            with torch.no_grad():
                hidden = objective.transformer(prefix[None])[0, -1]
                logits = objective.transformer.head(hidden).double()
            nats += number(logits.logsumexp(0) - logits[tokens[place]])
            right += int(logits.argmax() == tokens[place])
            predicted += 1
    losses = losses_of(objective, batch)
    assert {name: int(count) for name, count in objective.counts(batch).items()} == {
        "predicted_tokens": predicted
    }
    assert_near(losses.terms["next_token_nats_per_token"], torch.tensor(nats / predicted))
    assert_near(losses.metrics["next_token_accuracy"], torch.tensor(right / predicted))
    assert number(losses.total) == number(losses.terms["next_token_nats_per_token"])
    assert 0 <= right < predicted


def scored(objective: AutoregressiveObjective, batch: Batch) -> list[float]:
    """log p of each row with documents apart, as a checkpoint gives it."""
    checkpoint = AutoregressiveCheckpoint(objective.transformer, tiny_tokenizer())
    rows = [
        ScoredRow(tokens, key, documents)
        for key, (tokens, documents) in enumerate(
            zip(batch.tokens.tolist(), batch.document_ids.tolist(), strict=True)
        )
    ]
    return [found.log_p for found in log_likelihoods(checkpoint, rows, LikelihoodConfig())]


@pytest.mark.parametrize("alignment", [1, 8])
def test_the_loss_of_documents_apart_is_the_likelihood(alignment: int) -> None:
    objective, batch = objective_of(mask_documents=True), rows_of_documents(6, 32, alignment)
    objective.requires_grad_(False)
    nats = losses_of(objective, batch).terms["next_token_nats_per_token"]
    assert -sum(scored(objective, batch)) / int(batch.loss_mask.sum()) == pytest.approx(
        number(nats), rel=1e-5
    )


def test_what_documents_always_begin_with_is_learned() -> None:
    """It cost 10 nats a document where training did not show what follows the separator."""
    first = 7
    objective = AutoregressiveObjective(
        tiny_transformer(causal=True, seed=4, hidden_size=32).requires_grad_(True),
        AutoregressiveConfig(mask_documents=True),
    )
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for step in range(120):
        loss = losses_of(objective, rows_of_documents(16, 32, first=first, seed=step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    objective.requires_grad_(False)
    held_out = rows_of_documents(16, 32, first=first, seed=10**6)
    nats = -sum(scored(objective, held_out)) / int(held_out.loss_mask.sum())
    assert nats == pytest.approx(number(losses_of(objective, held_out).total), rel=1e-5)
    checkpoint = AutoregressiveCheckpoint(objective.transformer, tiny_tokenizer())
    (alone,) = log_likelihoods(checkpoint, [ScoredRow([first], 0)], LikelihoodConfig())
    # Some rows begin within a document.
    assert -alone.log_p < 0.6 < math.log(29)


def test_with_documents_apart_a_prompt_stands_behind_the_separator_that_likelihood_reads() -> None:
    network = tiny_transformer(causal=True, seed=4)
    checkpoint = AutoregressiveCheckpoint(network, tiny_tokenizer(), {"mask_documents": True})
    greedy = SamplerConfig(
        max_new_tokens=1, temperature=0, repetition_penalty=1.0, eos_token_ids=()
    )
    prompts: list[list[int]] = [[], *([first, 9] for first in range(4, 28))]
    # Padding is never scored.
    tokens = [token for token in range(checkpoint.vocab_size) if token != PAD]
    compared = 0
    for result in generate(checkpoint, prompts, greedy):
        rows = [ScoredRow([*result.prompt_ids, token], 0) for token in tokens]
        scores = [score.log_p for score in log_likelihoods(checkpoint, rows, LikelihoodConfig())]
        if result.decoded_ids != [PAD]:
            assert result.decoded_ids == [tokens[scores.index(max(scores))]]
            compared += 1
    assert compared > 12


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

"""Unigram and bigram statistics against loops over tokens and a dense table."""

import math

import torch
from torch import Tensor

from cola_train.likelihood.token_tables import BigramModel, PairTally, text_starts
from tests.helpers.tiny import make_batch, random_tokens

NUMBER = 8


def some_tokens(rows: int = 30, length: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a skewed chain, padding here and there, and where texts start; 7 never stands."""
    generator = torch.Generator().manual_seed(4)
    tokens = (torch.rand(rows, length, generator=generator) ** 2 * 7).long()
    counted = torch.rand(rows, length, generator=generator) < 0.9
    starts = torch.rand(rows, length, generator=generator) < 0.1
    starts[:, 0] = True
    return tokens, counted, starts


def counted_model() -> tuple[PairTally, BigramModel]:
    tally = PairTally(NUMBER)
    for part in zip(*(x.split(7) for x in some_tokens())):
        tally.add(*part)
    return tally, BigramModel.of(tally)


def dense_table() -> tuple[Tensor, Tensor]:
    """p (tokens) and P (tokens, tokens) by the definitions."""
    tokens, counted, starts = some_tokens()
    count, pairs = [0] * NUMBER, [[0] * NUMBER for _ in range(NUMBER)]
    for row in range(len(tokens)):
        for place, token in enumerate(tokens[row].tolist()):
            if not counted[row, place]:
                continue
            count[token] += 1
            if place > 0 and counted[row, place - 1] and not starts[row, place]:
                pairs[int(tokens[row, place - 1])][token] += 1
    p = [(n + 0.5) / (sum(count) + NUMBER / 2) for n in count]
    table = []
    for row in pairs:
        kinds, whole = sum(n > 0 for n in row), sum(row)
        table.append(
            [(n + kinds * q) / (whole + kinds) if whole else q for n, q in zip(row, p, strict=True)]
        )
    return torch.tensor(p, dtype=torch.float64), torch.tensor(table, dtype=torch.float64)


def test_a_sparse_model_is_the_dense_table_of_the_definition() -> None:
    tally, model = counted_model()
    p, table = dense_table()
    assert (tally.count[7], tally.pairs.numel() < NUMBER**2) == (0, True)
    assert torch.allclose(model.p, p, rtol=1e-12)
    ids = torch.tensor([3, 7, 0, 3, 1])
    assert torch.allclose(model.after(ids), table[ids].T, rtol=1e-12)
    assert torch.allclose(table.sum(1), torch.ones(NUMBER).double())
    weights = torch.rand(NUMBER, 5, generator=torch.Generator().manual_seed(1)).double()
    assert torch.allclose(model.forward(weights), table.T @ weights, rtol=1e-12)
    assert torch.allclose(model.backward(weights), table @ weights, rtol=1e-12)


def test_the_nats_of_tokens_are_those_of_the_table() -> None:
    model, (p, table) = counted_model()[1], dense_table()
    tokens = torch.tensor([[7, 0, 0, 1, 7], [2, 2, 7, 7, 0]])
    starts = torch.tensor([[True, False, False, True, False], [True, False, False, False, False]])
    unigram, bigram = model.nats(tokens, starts)
    for row in range(2):
        for place in range(5):
            token = tokens[row, place]
            known = p if starts[row, place] else table[tokens[row, place - 1]]
            assert math.isclose(unigram[row, place], -math.log(p[token]))
            assert math.isclose(bigram[row, place], -math.log(known[token]))


def test_where_no_pair_was_seen_nothing_is_known() -> None:
    tally = PairTally(3)
    tally.add(torch.tensor([[0], [2]]), torch.ones(2, 1).bool(), torch.ones(2, 1).bool())
    model = BigramModel.of(tally)
    expected = torch.tensor([1.5, 0.5, 1.5], dtype=torch.float64) / 3.5
    assert torch.allclose(model.after(torch.tensor([2]))[:, 0], expected)
    weights = torch.rand(3, 2).double()
    assert torch.allclose(model.forward(weights), expected[:, None] * weights.sum(0))
    unigram, bigram = model.nats(torch.tensor([[0, 2]]), torch.tensor([[True, False]]))
    assert torch.equal(unigram, bigram)


def test_a_text_starts_with_its_row_or_where_documents_are_apart_with_its_document() -> None:
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])
    batch = make_batch(random_tokens(2, 4, seed=0), [0, 0], documents)
    assert text_starts(batch, False).long().tolist() == [[1, 0, 0, 0]] * 2
    assert text_starts(batch, True).long().tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]

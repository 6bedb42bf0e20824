"""The LLaDA baseline's loss against enumeration: of masks, of orders in which tokens are revealed,
and of a true distribution.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from cola_train.data.batch import Batch
from cola_train.families.masked_diffusion.family import MaskedDiffusionConfig
from cola_train.families.masked_diffusion.objective import MaskedDiffusionObjective
from cola_train.models.config import TransformerConfig
from cola_train.models.transformer import Transformer
from tests.helpers.compare import assert_near, number
from tests.helpers.llama import llama_logits, tiny_transformer
from tests.helpers.losses import losses_of
from tests.helpers.partition import added_up, assert_same_step
from tests.helpers.tiny import make_batch, random_tokens, rows_of

SEED, VOCAB, SEQ = 12, 3, 3
MASKS = list(itertools.product([False, True], repeat=SEQ))


class GivenMask(MaskedDiffusionObjective):
    """With `given` in place of the draws."""

    given: tuple[float, Sequence[bool]]

    def draw_mask(self, batch: Batch) -> tuple[Tensor, Tensor]:
        t, mask = self.given
        rows = batch.tokens.shape[0]
        return torch.full((rows,), t), torch.tensor([mask]).expand(rows, -1) & batch.loss_mask


def text_nats(objective: GivenMask, text: Sequence[int], t: float, mask: Sequence[bool]) -> float:
    """What the loss gives a single row, in nats per text."""
    objective.given = (t, mask)
    with torch.no_grad():
        return SEQ * number(losses_of(objective, make_batch(torch.tensor([text]), [0])).total)


def mean_over_masks(objective: GivenMask, text: Sequence[int], t: float) -> float:
    return math.fsum(
        t ** sum(mask) * (1 - t) ** (SEQ - sum(mask)) * text_nats(objective, text, t, mask)
        for mask in MASKS
    )


def mean_over_times(objective: GivenMask, text: Sequence[int], low: float = 0.0) -> float:
    """t uniform in (low, 1]. Over t, the mean over masks is a polynomial of degree SEQ - 1: two
    nodes are exact.
    """
    nodes, weights = np.polynomial.legendre.leggauss(2)
    times = low + (1 - low) * (nodes + 1) / 2
    return math.fsum(
        weight / 2 * mean_over_masks(objective, text, float(t))
        for t, weight in zip(times, weights, strict=True)
    )


def given(network: Transformer) -> GivenMask:
    return GivenMask(network, MaskedDiffusionConfig(), SEED)


def naive_nats(network: Transformer, text: Sequence[int], mask: Sequence[bool]) -> list[float]:
    """-log p of each token of `text` where those under `mask` are hidden, by transformers'
    Llama.
    """
    tokens = torch.tensor(
        [
            [
                network.mask_token_id if hidden else token
                for token, hidden in zip(text, mask, strict=True)
            ]
        ]
    )
    seq = len(text)
    logits = llama_logits(
        network, tokens, torch.ones(1, seq, seq, dtype=torch.bool), torch.arange(seq)[None]
    )[0]
    return [
        -number(row.double().log_softmax(0)[token]) for row, token in zip(logits, text, strict=True)
    ]


@pytest.fixture
def network() -> Transformer:
    return tiny_transformer(causal=False, vocab_size=VOCAB)


@pytest.mark.parametrize("t", [0.01, 0.4, 1.0])
def test_the_mean_over_masks_is_what_enumeration_gives(network: Transformer, t: float) -> None:
    text = [2, 0, 1]
    wanted = 0.0
    for mask in MASKS:
        probability = math.prod(t if hidden else 1 - t for hidden in mask)
        wanted += probability * sum(
            nats / t
            for nats, hidden in zip(naive_nats(network, text, mask), mask, strict=True)
            if hidden
        )
    assert mean_over_masks(given(network), text, t) == pytest.approx(wanted, rel=1e-5)


def test_the_mean_over_times_is_the_mean_over_orders_of_revealing(network: Transformer) -> None:
    """The identity of any-order models: int t^(m-1) (1-t)^(n-m) dt weighs masks as a random order
    meets them.
    """
    text = [1, 2, 2]
    orders = list(itertools.permutations(range(SEQ)))
    wanted = 0.0
    for order in orders:
        for known in range(SEQ):
            hidden = [place in order[known:] for place in range(SEQ)]
            wanted += naive_nats(network, text, hidden)[order[known]] / len(orders)
    assert mean_over_times(given(network), text) == pytest.approx(wanted, rel=1e-5)


class TrueConditionals(Transformer):
    """Predicts by the conditionals of a joint distribution of texts."""

    def __init__(self, joint: Tensor) -> None:
        config = TransformerConfig(
            vocab_size=VOCAB,
            hidden_size=VOCAB,
            num_hidden_layers=1,
            num_attention_heads=1,
            head_dim=2,
        )
        super().__init__(config, causal=False)
        self.joint = joint
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(VOCAB))

    def forward(self, tokens: Tensor, document: Tensor | None = None) -> Tensor:  # type: ignore[override]
        rows = []
        for text in tokens.tolist():
            fitting = torch.zeros_like(self.joint)
            at = tuple(slice(None) if token == VOCAB else slice(token, token + 1) for token in text)
            fitting[at] = self.joint[at]
            rows.append(
                torch.stack(
                    [
                        fitting.sum([axis for axis in range(SEQ) if axis != place])
                        for place in range(SEQ)
                    ]
                )
            )
        # What is impossible gets a number all the same, for the head's product.
        return torch.stack(rows).clamp(min=1e-30).log()


def test_true_conditionals_lose_exactly_the_texts_negative_log_likelihood(
    network: Transformer,
) -> None:
    joint = torch.rand((VOCAB,) * SEQ, generator=torch.Generator().manual_seed(3)) + 0.02
    joint /= joint.sum()
    true, other = given(TrueConditionals(joint)), given(network)
    entropy = expected_other = 0.0
    for text in itertools.product(range(VOCAB), repeat=SEQ):
        nats = -math.log(joint[text])
        assert mean_over_times(true, text) == pytest.approx(nats, rel=1e-4)
        entropy += number(joint[text]) * nats
        expected_other += number(joint[text]) * mean_over_times(other, text)
    # And no model loses less than the entropy on average.
    assert expected_other > entropy + 0.05


def test_drawn_losses_are_unbiased(network: Transformer) -> None:
    low, text = 0.2, [2, 0, 1]
    objective = MaskedDiffusionObjective(network, MaskedDiffusionConfig(min_mask_prob=low), SEED)
    with torch.no_grad():
        means = torch.tensor(
            [
                SEQ
                * number(
                    losses_of(
                        objective,
                        make_batch(torch.tensor([text] * 500), [0] * 500, first_index=500 * part),
                    ).total
                )
                for part in range(40)
            ]
        ).double()
    error = number(means.std()) / len(means) ** 0.5
    assert error < 0.02 * number(means.mean())
    assert abs(number(means.mean()) - mean_over_times(given(network), text, low)) < 4 * error


def test_draws_are_addressed_and_only_real_tokens_are_masked() -> None:
    rows, seq, low = 2000, 10, 0.25
    objective = MaskedDiffusionObjective(
        tiny_transformer(causal=False), MaskedDiffusionConfig(min_mask_prob=low), SEED
    )
    batch = make_batch(random_tokens(rows, seq, seed=20), [row % 4 for row in range(rows)])
    t, masked = objective.draw_mask(batch)
    assert low < t.min() < low + 0.01
    assert 0.99 < t.max() <= 1
    assert not (masked & ~batch.loss_mask).any()
    # Uniform: an eighth of the rows in each eighth of the range; and of a row's real tokens a share
    # of t is masked.
    filled = torch.histc(t, 8, low, 1.0) / rows
    assert (filled - 1 / 8).abs().max() < 5 * (7 / 64 / rows) ** 0.5
    for chosen in (t < 0.5, t >= 0.5, t > 0.9):
        real = batch.loss_mask[chosen]
        expected, variance = (
            (t[chosen, None] * real).sum(),
            ((t * (1 - t))[chosen, None] * real).sum(),
        )
        assert (masked[chosen].sum() - expected).abs() < 5 * variance.sqrt()
    # The same wherever a row stands; another seed or sample draws otherwise.
    part = objective.draw_mask(rows_of(batch, slice(700, 703)))
    assert torch.equal(part[0], t[700:703])
    assert torch.equal(part[1], masked[700:703])
    assert t.unique().numel() > rows - 5
    assert not torch.equal(
        MaskedDiffusionObjective(objective.transformer, objective.config, SEED + 1).draw_mask(
            batch
        )[0],
        t,
    )


@pytest.mark.parametrize("mask_documents", [False, True])
def test_the_loss_and_its_accuracy_by_hand(six_rows: Batch, mask_documents: bool) -> None:
    """Padding and documents in place, one token at a time."""
    network = tiny_transformer(causal=False)
    objective = MaskedDiffusionObjective(
        network, MaskedDiffusionConfig(mask_documents=mask_documents), SEED
    )
    times, masks = objective.draw_mask(six_rows)
    nats, right = 0.0, 0
    for tokens, document, t, masked in zip(
        six_rows.tokens, six_rows.document_ids, times, masks, strict=True
    ):
        parts = (
            [document == number for number in document.unique()]
            if mask_documents
            else [document >= 0]
        )
        for part in parts:
            hidden = masked[part].tolist()
            with torch.no_grad():
                logits = network.head(network(torch.where(masked, 29, tokens)[part][None]))[
                    0
                ].double()
            for row, token, is_masked in zip(logits, tokens[part].tolist(), hidden, strict=True):
                if is_masked:
                    nats += number((row.logsumexp(0) - row[token]) / t)
                    right += int(row.argmax() == token)
    losses, counts = losses_of(objective, six_rows), objective.counts(six_rows)
    assert {name: int(count) for name, count in counts.items()} == {
        "tokens": int(six_rows.loss_mask.sum()),
        "masked_tokens": int(masks.sum()),
    }
    assert_near(
        losses.terms["masked_diffusion_nats_per_token"],
        torch.tensor(nats / int(counts["tokens"])),
        1e-4,
    )
    assert_near(
        losses.metrics["masked_token_accuracy"], torch.tensor(right / int(counts["masked_tokens"]))
    )
    assert right > 0


@pytest.mark.parametrize("mask_documents", [False, True])
def test_micro_batches_add_up_to_the_step(six_rows: Batch, mask_documents: bool) -> None:
    network = tiny_transformer(causal=False).requires_grad_(True)
    objective = MaskedDiffusionObjective(
        network, MaskedDiffusionConfig(mask_documents=mask_documents), SEED
    )
    whole = added_up(objective, six_rows, 6)
    assert len(whole[1]) == len(list(objective.parameters()))
    for rows_each in (1, 2, 3):
        assert_same_step(added_up(objective, six_rows, rows_each), whole)


def test_padding_alone_gives_zero_losses_and_no_gradient(six_rows: Batch) -> None:
    network = tiny_transformer(causal=False).requires_grad_(True)
    objective = MaskedDiffusionObjective(network, MaskedDiffusionConfig(), SEED)
    losses = losses_of(objective, rows_of(six_rows, slice(2, 3)))
    losses.total.backward()
    assert all(number(value) == 0 for value in losses.values().values())
    assert not any(
        parameter.grad.any() for parameter in objective.parameters() if parameter.grad is not None
    )

"""The head's loss part by part against logits and torch's cross-entropy, and the memory that it
takes.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cola_train.models import vocabulary_head
from cola_train.models.vocabulary_head import VocabularyHead
from cola_train.scaling.allocations import AllocationLog, MemoryPart
from cola_train.scaling.recording import RecordingMode


def plain(
    head: VocabularyHead, hidden: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    logits = head(hidden).float()
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").unflatten(
        0, targets.shape
    )
    return (nats * weights).sum(), ((logits.argmax(-1) == targets) & (weights > 0)).sum()


def example(
    rows: int, seq: int, dim: int, vocab: int, bias: bool, seed: int
) -> tuple[VocabularyHead, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = VocabularyHead(dim, vocab, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(rows, seq, dim, generator=generator).requires_grad_()
    targets = torch.randint(0, vocab, (rows, seq), generator=generator)
    weights = torch.rand(rows, seq, generator=generator) * torch.randint(
        0, 2, (rows, seq), generator=generator
    )
    return head, hidden, targets, weights


def gradients(loss: Tensor, head: VocabularyHead, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(0.3 * loss, [hidden, *head.parameters()]))


@pytest.fixture(autouse=True)
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of small vocabularies too."""
    monkeypatch.setattr(vocabulary_head, "_IDS_A_PART", 3)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).float().norm() / expected.float().norm().clamp(min=1e-6))


@settings(max_examples=40)
@given(
    rows=st.integers(1, 3),
    seq=st.integers(1, 40),
    dim=st.integers(1, 9),
    vocab=st.integers(2, 50),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_gradients_are_those_of_the_whole_logits(
    rows: int, seq: int, dim: int, vocab: int, bias: bool, seed: int
) -> None:
    head, hidden, targets, weights = example(rows, seq, dim, vocab, bias, seed)
    loss, right = head.losses(hidden, targets, weights)
    expected, expected_right = plain(head, hidden, targets, weights)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    assert right.item() == expected_right.item()
    for one, other in zip(
        gradients(loss, head, hidden), gradients(expected, head, hidden), strict=True
    ):
        assert one.shape == other.shape
        assert relative(one, other) < 1e-4 or float(other.norm()) < 1e-4


def test_bf16_is_within_a_hundredth_of_fp32() -> None:
    head, hidden, targets, weights = example(2, 64, 32, 500, True, seed=3)
    expected, _ = plain(head, hidden, targets, weights)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head.losses(hidden, targets, weights)
    assert loss.dtype == torch.float32
    assert relative(loss.detach(), expected.detach()) < 1e-2
    for one, other in zip(
        gradients(loss, head, hidden), gradients(expected, head, hidden), strict=True
    ):
        assert one.dtype == torch.float32
        assert relative(one, other) < 1e-2


def _bf16_errors(scale: float) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of `scale` times the loss of many positions: ours and the plain way's in bf16, and
    the plain way's in fp64.
    """
    head, hidden, targets, weights = example(8, 128, 32, 200, True, seed=8)
    with torch.no_grad():
        # What bf16 holds: rounding of inputs is in none of the three.
        for tensor in (hidden, *head.parameters()):
            tensor.copy_(0.3 * tensor).copy_(tensor.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = head.losses(hidden, targets, weights)
        theirs, _ = plain(head, hidden, targets, weights)
    inputs = [hidden, *head.parameters()]
    logits = hidden.double() @ head.weight.double().T + head.bias.double()
    picked = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    exact = -(weights.double() * picked).sum()
    losses = (scale * ours, scale * theirs, scale * exact)
    found = [list(torch.autograd.grad(loss, inputs)) for loss in losses]
    return found[0], found[1], found[2]


def test_bf16_sums_the_weights_gradient_over_parts_as_exactly_as_the_plain_way() -> None:
    """Summed in bf16 over 16 parts it was off by three times as much."""
    ours, theirs, exact = _bf16_errors(1.0)
    error, plain_error = (
        float((side[1] - exact[1]).norm() / exact[1].norm()) for side in (ours, theirs)
    )
    assert error < 1.2 * plain_error


@pytest.mark.parametrize("scale", [1 / 2.9921875 / 1000, 0.3, 1 / 4100])
def test_bf16_does_not_round_the_loss_scale(scale: float) -> None:
    """Rounded to bf16 it moved all gradients of a term by the same share, up to 0.2 %."""
    ours, _, exact = _bf16_errors(scale)
    for one, other in zip(ours, exact, strict=True):
        along = float((one * other).sum() / (other * other).sum())
        assert along == pytest.approx(1, abs=4e-4)


@pytest.mark.parametrize("gathered", [torch.float32, torch.bfloat16])
def test_in_bf16_the_fp32_sum_goes_with_the_forward_pass(gathered: torch.dtype) -> None:
    """Weights gathered in bf16, as in a sharded run, get a gradient of 2 bytes; the peak stays well
    below the logits of the plain way.
    """
    rows, seq, dim, vocab = 8, 512, 1536, 100_278
    mode, log = RecordingMode(), AllocationLog(vocab)
    with mode:
        head = VocabularyHead(dim, vocab).to(gathered)
        hidden = torch.zeros(rows, seq, dim, requires_grad=True)
        targets, weights = torch.zeros(rows, seq, dtype=torch.int64), torch.ones(rows, seq)
    log.take(MemoryPart.WEIGHTS, [*head.parameters(), hidden, targets, weights])
    with mode.recording_to(log):
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = head.losses(hidden, targets, weights)
        forward = len(log.live())
        loss.backward()
    live = log.live()
    beside = live.sum(axis=1) - live[:, MemoryPart.WEIGHTS]
    logits, gradient = rows * seq * vocab * 4, vocab * dim * gathered.itemsize
    assert gradient < beside[forward - 1 :].max() < 1.25 * gradient
    assert beside.max() < 0.7 * logits


def test_frozen_weights_and_validation_get_no_gradients() -> None:
    head, hidden, targets, weights = example(1, 20, 8, 30, False, seed=4)
    expected, _ = plain(head, hidden, targets, weights)
    with torch.no_grad():
        loss, _ = head.losses(hidden, targets, weights)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    (of_hidden,) = torch.autograd.grad(expected, hidden, retain_graph=True)
    head.requires_grad_(False)
    loss, right = head.losses(hidden, targets, weights)
    assert not right.requires_grad
    (alone,) = torch.autograd.grad(loss, hidden)
    assert relative(alone, of_hidden) < 1e-4


def test_memory_beside_weights_gradients_and_inputs_is_a_small_part_of_the_logits() -> None:
    """At the paper's size, from what the program allocates: torch's fake tensors have sizes and no
    memory.
    """
    rows, seq, dim, vocab = 8, 512, 1536, 100_278
    mode, log = RecordingMode(), AllocationLog(vocab)
    with mode:
        head = VocabularyHead(dim, vocab)
        hidden = torch.zeros(rows, seq, dim, requires_grad=True)
        targets, weights = torch.zeros(rows, seq, dtype=torch.int64), torch.ones(rows, seq)
    log.take(MemoryPart.WEIGHTS, [*head.parameters(), hidden, targets, weights])
    with mode.recording_to(log):
        loss, _ = head.losses(hidden, targets, weights)
        loss.backward()
        log.take(
            MemoryPart.GRADIENTS,
            [x.grad for x in (hidden, *head.parameters()) if x.grad is not None],
        )
    live = log.live()
    assert live[:, MemoryPart.GRADIENTS].max() > vocab * dim * 4
    beside = live.sum(axis=1) - live[:, MemoryPart.GRADIENTS] - live[:, MemoryPart.WEIGHTS]
    # A sixteenth of the logits is there at a time.
    assert 0.0625 < beside.max() / (rows * seq * vocab * 4) < 0.07


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_second_backward_of_a_retained_graph_gives_the_same_gradients(
    compute: torch.dtype,
) -> None:
    """Those of the plain way; results of the first one stay as they were."""
    head, hidden, targets, weights = example(2, 30, 16, 50, True, seed=5)
    inputs = [hidden, *head.parameters()]
    with torch.autocast("cpu", compute, enabled=compute != torch.float32):
        loss, _ = head.losses(hidden, targets, weights)
        expected, _ = plain(head, hidden, targets, weights)
    once = torch.autograd.grad(0.3 * loss, inputs, retain_graph=True)
    before = [gradient.clone() for gradient in once]
    twice = torch.autograd.grad(0.3 * loss, inputs, retain_graph=True)
    last = torch.autograd.grad(0.6 * loss, inputs)
    wanted = torch.autograd.grad(0.3 * expected, inputs)
    for first, kept, second, third, other in zip(once, before, twice, last, wanted, strict=True):
        assert torch.equal(first, kept)
        assert torch.equal(second, first)
        assert relative(third, 2 * first) < (1e-6 if compute == torch.float32 else 1e-2)
        assert relative(first, other) < (1e-4 if compute == torch.float32 else 2e-2)


def test_a_graph_that_was_not_retained_is_refused_as_torch_refuses_it() -> None:
    head, hidden, targets, weights = example(1, 20, 8, 30, False, seed=6)
    for losses in (plain, VocabularyHead.losses):
        loss, _ = losses(head, hidden, targets, weights)
        torch.autograd.grad(loss, hidden)
        with pytest.raises(
            RuntimeError, match="Trying to backward through the graph a second time"
        ):
            torch.autograd.grad(loss, hidden)


def test_gradients_of_gradients_are_refused() -> None:
    """They would be those of a scaling alone."""
    head, hidden, targets, weights = example(1, 20, 8, 30, False, seed=7)
    (once,) = torch.autograd.grad(
        head.losses(hidden, targets, weights)[0] ** 2, hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        once.sum().backward()

"""The baselines' log p(x) against transformers' Llama, and against the mean over all masks."""

import itertools
import math

import pytest
import torch

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.evaluation.likelihood.likelihood import conditional_scores, log_likelihoods
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.likelihood.rows import ScoredRow
from tests.helpers.llama import llama_of, tiny_baseline
from tests.helpers.tiny import PAD, random_tokens

EOS = 0
CONFIG = LikelihoodConfig(num_samples=2)


def texts(*lengths: int) -> list[list[int]]:
    return [
        random_tokens(1, length, seed=80 + number)[0].tolist()
        for number, length in enumerate(lengths)
    ]


# The autoregressive model


def llama_log_p(checkpoint: TransformerCheckpoint, tokens: list[int]) -> list[float]:
    """Of each token after the end-of-text token and those before it, by transformers' Llama."""
    logits = (
        llama_of(checkpoint.transformer)(torch.tensor([[EOS, *tokens]])).logits[0].log_softmax(-1)
    )
    return [float(logits[place, token]) for place, token in enumerate(tokens)]


def test_an_autoregressive_models_likelihood_is_llamas() -> None:
    checkpoint = tiny_baseline(causal=True)
    for tokens in texts(1, 6, 11):
        (found,) = log_likelihoods(checkpoint, [ScoredRow(tokens, 0)], CONFIG)
        assert found.log_p == pytest.approx(sum(llama_log_p(checkpoint, tokens)), abs=1e-4)
        assert (found.standard_error, found.iwae, found.prior) == (0.0, None, None)
    prompt, continuation = texts(5, 4)
    (score,) = conditional_scores(checkpoint, [(prompt, continuation)], CONFIG, [0])
    assert score == pytest.approx(
        sum(llama_log_p(checkpoint, [*prompt, *continuation])[5:]), abs=1e-4
    )


def test_an_autoregressive_models_documents_begin_after_separators_of_their_own() -> None:
    checkpoint, tokens = tiny_baseline(causal=True), [*texts(9)[0], EOS, PAD, PAD]
    apart, first, second = log_likelihoods(
        checkpoint,
        [
            ScoredRow(tokens, 0, [0] * 4 + [1] * 8),
            ScoredRow(tokens[:4], 0),
            ScoredRow(tokens[4:10], 0),
        ],
        CONFIG,
    )
    assert apart.log_p == pytest.approx(first.log_p + second.log_p, abs=1e-4)
    assert apart.num_tokens == 10


# Masked diffusion


def enumerated_bound(checkpoint: TransformerCheckpoint, tokens: list[int], given: int = 0) -> float:
    """-E[(1/t) sum of masked tokens' nats] with the integral over t in (0, 1] of each mask's
    probability done by hand.

    A mask of l of L tokens has the integral of t^(l-1) (1-t)^(L-l), which is (l-1)! (L-l)! / L!.
    """
    length, total = len(tokens) - given, 0.0
    for size in range(1, length + 1):
        weight = math.factorial(size - 1) * math.factorial(length - size) / math.factorial(length)
        for places in itertools.combinations(range(given, len(tokens)), size):
            masked = torch.tensor([tokens])
            masked[0, list(places)] = checkpoint.transformer.mask_token_id
            logits = checkpoint.transformer.head(checkpoint.transformer(masked))[0].log_softmax(-1)
            total += weight * sum(float(logits[place, tokens[place]]) for place in places)
    return total


@pytest.mark.parametrize("given", [0, 2])
def test_a_masked_diffusion_models_bound_is_the_mean_over_all_masks(given: int) -> None:
    checkpoint, tokens = tiny_baseline(causal=False), texts(5)[0]
    config = LikelihoodConfig(num_samples=2000, batch_size=1000)
    (found,) = log_likelihoods(checkpoint, [ScoredRow(tokens, 3, given=given)], config)
    assert found.standard_error is not None
    assert 0 < found.standard_error < 0.15
    assert abs(found.log_p - enumerated_bound(checkpoint, tokens, given)) < 4 * found.standard_error
    assert (found.num_tokens, found.iwae) == (5 - given, None)


def test_a_masked_diffusion_model_of_one_token_has_no_noise() -> None:
    checkpoint = tiny_baseline(causal=False)
    found = log_likelihoods(
        checkpoint, [ScoredRow([token], 3) for token in range(29) if token != PAD], CONFIG
    )
    assert all(row.standard_error == 0 for row in found)
    padding = checkpoint.transformer.head(checkpoint.transformer(torch.tensor([[29]]))).softmax(-1)[
        0, 0, PAD
    ]
    assert sum(math.exp(row.log_p) for row in found) == pytest.approx(1 - float(padding), abs=1e-5)


def test_a_masked_diffusion_models_documents_and_padding_stay_apart() -> None:
    checkpoint, tokens = tiny_baseline(causal=False), texts(3)[0]
    config = LikelihoodConfig(num_samples=1500, batch_size=1000)
    padded = ScoredRow([*tokens, PAD, PAD], 3, [0] * 3 + [1] * 2)
    (found,) = log_likelihoods(checkpoint, [padded], config)
    assert found.standard_error is not None
    assert abs(found.log_p - enumerated_bound(checkpoint, tokens)) < 4 * found.standard_error

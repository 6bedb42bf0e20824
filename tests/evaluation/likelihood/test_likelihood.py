"""log p(x) of Cola DLM against quadrature and slow loops; and, for all families, that nothing
depends on what else is asked.
"""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_train.config.evaluation import LikelihoodConfig
from cola_train.config.settings import UserError
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.likelihood.likelihood import (
    RowLikelihood,
    conditional_scores,
    log_likelihoods,
)
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.likelihood import LatentWeights, block_log_densities
from cola_train.families.transformer.checkpoint import TransformerCheckpoint
from cola_train.likelihood.rows import Draw, ScoredRow, batches, draws_at
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.randomness import Purpose, normal
from tests.helpers.llama import tiny_baseline
from tests.helpers.tiny import PAD, calm, random_tokens, tiny_checkpoint, tiny_dit, tiny_vae

EOS = 0
FAST = LikelihoodConfig(num_samples=2, num_steps=2)
ODE = dataclasses.replace(FAST, method="ode")


def texts(*lengths: int) -> list[list[int]]:
    return [
        random_tokens(1, length, seed=80 + number)[0].tolist()
        for number, length in enumerate(lengths)
    ]


def cola(**vae: Any) -> ColaCheckpoint:
    return tiny_checkpoint(tiny_vae(**vae), calm(tiny_dit()))


# Cola DLM against quadrature over all its latents


INTEGRAL = LikelihoodConfig(
    method="ode", num_samples=1000, num_steps=12, divergence="exact", batch_size=1000
)


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """log p(text) of texts that fit into a block of two one-channel latents, with nothing drawn:
    the sum over a grid of both.
    """

    log_mass: Tensor  # of each grid point's cell under the prior
    log_probabilities: Tensor  # (points, 2, vocab)

    def log_p(self, tokens: list[int]) -> float:
        parts = [self.log_probabilities[:, place, token] for place, token in enumerate(tokens)]
        return float(torch.logsumexp(self.log_mass + sum(parts), 0))


@pytest.fixture(scope="module")
def small() -> ColaCheckpoint:
    """One channel a latent: the posterior's mean is 0, its variance here wide enough to cover the
    true posterior.
    """
    vae, dit = (
        tiny_vae(latent_dim=1),
        calm(tiny_dit(txt_in_channels=1, txt_out_channels=1, block_size=2)),
    )
    with torch.no_grad():
        vae.encoder.final_layer.weight.mul_(0.2)
        vae.encoder.final_layer.bias[1] = 1.0
    return tiny_checkpoint(vae, dit)


@pytest.fixture(scope="module")
def quadrature(small: ColaCheckpoint) -> Quadrature:
    assert small.dit is not None
    axis = torch.linspace(-7, 7, 57)
    z_0 = torch.cartesian_prod(axis, axis)[..., None]
    log_prior = block_log_densities(small.dit, z_0, INTEGRAL).sum(1)
    return Quadrature(
        log_prior + 2 * math.log(float(axis[1] - axis[0])),
        small.vae.decode(z_0).log_softmax(-1).double(),
    )


@pytest.mark.parametrize("tokens", [[7], [21], [7, 12]])
def test_iwae_comes_to_the_integral_over_all_latents_whether_a_block_is_full_or_filled(
    small: ColaCheckpoint, quadrature: Quadrature, tokens: list[int]
) -> None:
    (found,) = log_likelihoods(small, [ScoredRow(tokens, key=5)], INTEGRAL)
    truth = quadrature.log_p(tokens)
    assert found.iwae is not None
    assert found.standard_error is not None
    assert found.iwae == pytest.approx(truth, abs=0.05)
    assert found.log_p < truth - 0.1
    assert found.num_tokens == len(tokens)
    assert found.log_p == pytest.approx(
        sum(x for x in (found.reconstruction, found.prior, found.entropy) if x is not None)
    )


def test_the_integrals_over_all_texts_of_a_token_add_up_to_1(quadrature: Quadrature) -> None:
    assert sum(math.exp(quadrature.log_p([token])) for token in range(29)) == pytest.approx(
        1, abs=2e-3
    )


def test_the_parts_are_those_of_a_slow_loop() -> None:
    checkpoint, tokens = cola(), texts(6)[0]
    assert checkpoint.dit is not None
    (found,) = log_likelihoods(checkpoint, [ScoredRow(tokens, key=9)], ODE)
    filled = torch.tensor([[*tokens, EOS, EOS]])
    posterior = checkpoint.vae.encode(filled)
    reconstruction, prior, entropy = [], [], []
    for number in range(2):
        at = {
            "rows": [ScoredRow(tokens, key=9)],
            "draws": [Draw(0, number)],
            "count": 32,
            "device": torch.device("cpu"),
        }
        eps = draws_at(normal, 0, Purpose.LIKELIHOOD_EPS, **at).reshape(1, 8, 4)  # type: ignore[arg-type]
        probe = draws_at(torch_signs, 0, Purpose.LIKELIHOOD_PROBE, **at).reshape(1, 8, 4)  # type: ignore[arg-type]
        z_0 = posterior.mean + (0.5 * posterior.logvar).exp() * eps
        log_probabilities = checkpoint.vae.decode(z_0).log_softmax(-1)[0]
        reconstruction.append(
            sum(float(log_probabilities[place, token]) for place, token in enumerate(tokens))
        )
        prior.append(float(block_log_densities(checkpoint.dit, z_0, FAST, probe=probe).sum()))
        q = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
        entropy.append(-float(q.log_prob(z_0).sum()))
    assert found.reconstruction == pytest.approx(sum(reconstruction) / 2, abs=1e-3)
    assert found.prior == pytest.approx(sum(prior) / 2, abs=1e-3)
    assert found.entropy == pytest.approx(sum(entropy) / 2, abs=1e-3)
    one, other = (sum(parts) for parts in zip(reconstruction, prior, entropy, strict=True))
    assert found.standard_error == pytest.approx(abs(one - other) / 2, abs=1e-3)
    assert found.iwae == pytest.approx(
        float(torch.tensor([one, other]).logsumexp(0)) - math.log(2), abs=1e-3
    )


def torch_signs(*address: Any) -> Tensor:
    from cola_train.randomness import uniform

    return torch.where(uniform(*address) < 0.5, -1.0, 1.0)


def test_padding_within_a_row_is_not_scored() -> None:
    checkpoint, tokens = cola(), [*texts(6)[0], PAD, PAD]
    (found,) = log_likelihoods(checkpoint, [ScoredRow(tokens, key=1)], FAST)
    posterior = checkpoint.vae.encode(torch.tensor([tokens]))
    nats = []
    for number in range(2):
        eps = draws_at(
            normal,
            0,
            Purpose.LIKELIHOOD_EPS,
            [ScoredRow(tokens, key=1)],
            [Draw(0, number)],
            32,
            torch.device("cpu"),
        )
        log_probabilities = checkpoint.vae.decode(
            posterior.sample(eps.reshape(1, 8, 4))
        ).log_softmax(-1)[0]
        nats.append(
            sum(float(log_probabilities[place, token]) for place, token in enumerate(tokens[:6]))
        )
    assert found.num_tokens == 6
    assert found.reconstruction == pytest.approx(sum(nats) / 2, abs=1e-3)


@pytest.mark.parametrize("config", [FAST, ODE], ids=["bound", "ode"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_documents_apart_are_texts_of_their_own(patch_size: int, config: LikelihoodConfig) -> None:
    checkpoint, block = cola(patch_size=patch_size), 4 * patch_size
    tokens, config = (
        texts(3 * block)[0],
        dataclasses.replace(config, num_samples=64, divergence="exact"),
    )
    apart, first, second = log_likelihoods(
        checkpoint,
        [
            ScoredRow(tokens, 1, [0] * block + [1] * 2 * block),
            ScoredRow(tokens[:block], 1),
            ScoredRow(tokens[block:], 1),
        ],
        config,
    )
    # The second document's draws are others than those of the row's places.
    error = sum(found.standard_error or math.nan for found in (apart, second))
    assert abs(apart.log_p - first.log_p - second.log_p) < 3 * error
    (together,) = log_likelihoods(checkpoint, [ScoredRow(tokens, 1)], config)
    assert abs(apart.log_p - together.log_p) > 0.1
    assert apart.num_tokens == 3 * block


# Families alike


def checkpoints() -> dict[str, ColaCheckpoint | TransformerCheckpoint]:
    return {"cola": cola(), "ar": tiny_baseline(causal=True), "llada": tiny_baseline(causal=False)}


@pytest.mark.parametrize(
    ("family", "config"), [("cola", FAST), ("cola", ODE), ("ar", FAST), ("llada", FAST)]
)
def test_a_row_gets_what_it_gets_alone_in_any_batch_and_order(
    family: str, config: LikelihoodConfig
) -> None:
    checkpoint = checkpoints()[family]
    rows = [
        ScoredRow(tokens, key=3 * number, given=number % 2)
        for number, tokens in enumerate(texts(7, 8, 5, 8, 13))
    ]
    together = log_likelihoods(
        checkpoint, rows, dataclasses.replace(config, num_samples=3, batch_size=4)
    )
    backwards = log_likelihoods(
        checkpoint, rows[::-1], dataclasses.replace(config, num_samples=3, batch_size=32)
    )[::-1]
    alone = [
        log_likelihoods(
            checkpoint, [row], dataclasses.replace(config, num_samples=3, batch_size=1)
        )[0]
        for row in rows
    ]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-3)
        assert numbers(one) == pytest.approx(numbers(third), abs=1e-3)
    assert len({round(found.log_p, 2) for found in together}) == len(rows)


def numbers(found: RowLikelihood) -> list[float]:
    return [value for value in dataclasses.astuple(found) if value is not None]


def test_dopri5_depends_on_the_batch_within_its_tolerance_only() -> None:
    """On a velocity so smooth that at this tolerance the solver's own error is far below the
    bound.
    """
    checkpoint = dataclasses.replace(cola(), dit=calm(calm(tiny_dit())))
    rows = [ScoredRow(tokens, key) for key, tokens in enumerate(texts(8, 8, 8))]
    config = LikelihoodConfig(method="ode", num_samples=1, solver="dopri5", rtol=1e-3, atol=1e-3)
    together = [found.log_p for found in log_likelihoods(checkpoint, rows, config)]
    alone = [log_likelihoods(checkpoint, [row], config)[0].log_p for row in rows]
    assert together == pytest.approx(alone, abs=0.05)


@pytest.mark.parametrize("family", ["cola", "llada"])
def test_the_key_the_seed_and_k_decide_the_draws(family: str) -> None:
    checkpoint, tokens = checkpoints()[family], texts(8)[0]

    def log_p(key: int, seed: int = 0, num_samples: int = 2) -> float:
        config = dataclasses.replace(FAST, seed=seed, num_samples=num_samples)
        return log_likelihoods(checkpoint, [ScoredRow(tokens, key)], config)[0].log_p

    assert len({log_p(1), log_p(2), log_p(1, seed=1), log_p(1, num_samples=1)}) == 4
    assert log_p(2**62 + 5) == log_p(2**62 + 5)


def test_draws_are_the_same_whatever_the_length() -> None:
    rows, cpu = [ScoredRow([5], key=7)], torch.device("cpu")
    long, short = (
        draws_at(normal, 3, Purpose.LIKELIHOOD_EPS, rows, [Draw(0, 0), Draw(0, 4095)], count, cpu)
        for count in (50, 20)
    )
    assert torch.equal(long[:, :20], short)
    assert not torch.equal(long[0], long[1])


def test_batches_hold_all_draws_once_and_one_width_each() -> None:
    widths = [4, 8, 4, 8, 12]
    found = list(batches(widths, num_draws=3, batch_size=4))
    assert sorted(draw for batch in found for draw in batch) == [
        Draw(row, number) for row in range(5) for number in range(3)
    ]
    assert [widths[batch[0].row] for batch in found] == [12, 8, 8, 4, 4]
    assert all(
        len({widths[draw.row] for draw in batch}) == 1 and len(batch) <= 4 for batch in found
    )


# Conditional scores


def test_colas_score_is_the_difference_of_two_elbos_on_the_same_draws() -> None:
    checkpoint, (prompt, continuation) = cola(), texts(5, 4)
    (score,) = conditional_scores(checkpoint, [(prompt, continuation)], ODE, [6])
    whole, part = log_likelihoods(
        checkpoint, [ScoredRow([*prompt, *continuation], 6), ScoredRow(prompt, 6)], ODE
    )
    assert score == pytest.approx(whole.log_p - part.log_p, abs=1e-4)
    (row,) = log_likelihoods(checkpoint, [ScoredRow([*prompt, *continuation], 6, given=5)], ODE)
    assert whole.iwae is not None
    assert part.iwae is not None
    assert row.iwae == pytest.approx(whole.iwae - part.iwae, abs=1e-4)
    assert row.num_tokens == 4
    assert row.log_p == pytest.approx(
        sum(x for x in (row.reconstruction, row.prior, row.entropy) if x is not None)
    )


def test_a_prompt_that_ends_within_a_block_is_subtracted_too() -> None:
    checkpoint, (prompt, continuation) = cola(), texts(5, 4)
    rows = [ScoredRow([*prompt, *continuation], 6, given=given) for given in (5, 0)]
    after, whole, part = log_likelihoods(checkpoint, [*rows, ScoredRow(prompt, 6)], FAST)
    assert after.log_p == pytest.approx(whole.log_p - part.log_p, abs=1e-4)
    assert (after.iwae, after.step_change) == (None, None)


def test_twice_as_many_steps_of_the_solver_are_told() -> None:
    checkpoint, rows = cola(), [ScoredRow(texts(8)[0], 6)]
    (coarse,), (fine,) = (
        log_likelihoods(checkpoint, rows, dataclasses.replace(ODE, num_steps=steps))
        for steps in (2, 4)
    )
    assert coarse.step_change == pytest.approx(fine.log_p - coarse.log_p, abs=1e-4)
    assert abs(coarse.step_change or 0.0) > 1e-3
    (adaptive,) = log_likelihoods(checkpoint, rows, dataclasses.replace(ODE, solver="dopri5"))
    assert adaptive.step_change is None


def test_noise_of_what_prompt_and_text_share_cancels() -> None:
    # 16 tokens of prompt are four whole blocks; what differs is one.
    checkpoint, (prompt, continuation) = cola(), texts(16, 4)
    config = dataclasses.replace(FAST, num_samples=16)
    after, whole = log_likelihoods(
        checkpoint,
        [ScoredRow([*prompt, *continuation], 6, given=given) for given in (16, 0)],
        config,
    )
    assert after.standard_error is not None
    assert whole.standard_error is not None
    assert after.standard_error < 0.7 * whole.standard_error


def test_a_prompt_that_options_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, (prompt, *options) = cola(), texts(5, 3, 3, 2)
    computed = []

    class Counting(LatentWeights):
        def __init__(
            self,
            vae: TextVAE,
            dit: BlockCausalDiT,
            tokenizer: Tokenizer,
            rows: list[ScoredRow],
            config: LikelihoodConfig,
        ) -> None:
            computed.extend(rows)
            super().__init__(vae, dit, tokenizer, rows, config)

    monkeypatch.setattr("cola_train.families.cola.checkpoint.LatentWeights", Counting)
    conditional_scores(checkpoint, [(prompt, option) for option in options], FAST, [4] * 3)
    assert sorted(len(row.tokens) for row in computed) == [5, 7, 8, 8]


@pytest.mark.parametrize("family", ["cola", "ar", "llada"])
def test_nothing_given_is_the_whole_likelihood(family: str) -> None:
    checkpoint, tokens = checkpoints()[family], texts(6)[0]
    (found,) = log_likelihoods(checkpoint, [ScoredRow(tokens, 8)], FAST)
    assert conditional_scores(checkpoint, [([], tokens)], FAST, [8]) == [
        pytest.approx(found.log_p, abs=1e-5)
    ]


# What is refused


def test_documents_apart_must_fill_their_blocks_for_the_bound() -> None:
    checkpoint, row = cola(), ScoredRow(texts(6)[0], 0, [0] * 4 + [1] * 2)
    with pytest.raises(UserError, match=r"Row 0 keeps documents apart and has 6 tokens; .* of 4"):
        log_likelihoods(checkpoint, [row], FAST)
    log_likelihoods(checkpoint, [row], ODE)


def test_a_vae_alone_is_refused() -> None:
    with pytest.raises(UserError, match="holds a VAE only; likelihood needs the DiT of stage 2"):
        log_likelihoods(tiny_checkpoint(tiny_vae(), None), [ScoredRow([5], 0)], FAST)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ScoredRow([], 0),
            "Row 1 has no token to score: give it at least one that is not padding.",
        ),
        (ScoredRow([PAD, PAD], 0), "Row 1 has no token to score"),
        (ScoredRow([5, 6], 0, given=2), "at least one that is not padding after the given ones"),
        (
            ScoredRow([5, 29], 0),
            (
                r"Row 1 has id 29, outside the vocabulary, 0\.\.28; encode it with the "
                r"checkpoint's own tokenizer"
            ),
        ),
        (ScoredRow([5, -1], 0), "Row 1 has id -1"),
        (ScoredRow([5], -1), r"Row 1 has key -1; keys .* must be in \[0, 2\^63\)"),
    ],
)
@pytest.mark.parametrize("family", ["cola", "ar"])
def test_rows_that_cannot_be_scored_are_refused(family: str, row: ScoredRow, message: str) -> None:
    with pytest.raises(UserError, match=message):
        log_likelihoods(checkpoints()[family], [ScoredRow([5], 0), row], FAST)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_samples": 0}, r"num_samples must be in 1\.\.4096, not 0"),
        ({"num_samples": 4097}, "num_samples must be in"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"rtol": 0.0}, r"rtol must be in \(0, 1\), not 0"),
        ({"atol": 1.0}, r"atol must be in \(0, 1\), not 1"),
        ({"num_rows": 0}, "num_rows must be at least 1 or null, not 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LikelihoodConfig(**setting)

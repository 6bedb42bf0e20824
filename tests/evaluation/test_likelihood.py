"""log p(x): bounds against closed forms, quadrature and enumeration; and that nothing depends on what else is asked."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cola_train.baseline_format import BaselineCheckpoint
from cola_train.config.likelihood import LikelihoodConfig
from cola_train.config.settings import UserError
from cola_train.evaluation import latent_likelihood
from cola_train.evaluation.importance import LogWeights, elbo, iwae, log_weights
from cola_train.evaluation.latent_likelihood import LatentWeights
from cola_train.evaluation.likelihood import RowLikelihood, conditional_scores, log_likelihoods
from cola_train.evaluation.prior_density import block_log_densities, log_density
from cola_train.evaluation.rows import Draw, Row, batches, draws_at
from cola_train.hf_format import Checkpoint
from cola_train.randomness import Purpose, normal
from tests.helpers.gaussian import GaussianModel, gaussian_model
from tests.helpers.llama import llama_of, tiny_baseline
from tests.helpers.tiny import PAD, calm, random_tokens, tiny_checkpoint, tiny_dit, tiny_vae

EOS = 0
FAST = LikelihoodConfig(num_samples=2, num_steps=2)


def texts(*lengths: int) -> list[list[int]]:
    return [random_tokens(1, length, seed=80 + number)[0].tolist() for number, length in enumerate(lengths)]


def cola(**vae: Any) -> Checkpoint:
    return tiny_checkpoint(tiny_vae(**vae), calm(tiny_dit()))


# On a Gaussian latent model, where log p(x) is known


@pytest.fixture(scope="module")
def gaussian() -> GaussianModel:
    return gaussian_model(seed=3)


def gaussian_weights(model: GaussianModel, count: int, spread: float, hutchinson: bool = False) -> LogWeights:
    """As `count` draws from a posterior that is wider than it should be by `spread`, the prior by its ODE."""
    generator = torch.Generator().manual_seed(11)
    eps = torch.randn(count, 1, 3, generator=generator, dtype=torch.float64)
    probe = 2.0 * torch.randint(0, 2, (count, 1, 3), generator=generator).double() - 1 if hutchinson else None
    config = LikelihoodConfig(num_steps=48)

    def log_prior(z_0: Tensor) -> Tensor:
        return log_density(model.prior.velocity, z_0, config, probe).sum(1)

    return log_weights(model.posterior(count, spread), eps, model.log_likelihood, log_prior)


@pytest.mark.parametrize("hutchinson", [False, True])
@pytest.mark.parametrize("spread", [1.0, 1.7])
def test_the_elbo_is_below_log_p_by_the_posteriors_divergence(gaussian: GaussianModel, spread: float, hutchinson: bool) -> None:
    log_w = gaussian_weights(gaussian, 8000, spread, hutchinson).total
    gap = gaussian.gap(gaussian.posterior(1, spread))
    assert gap > 0.2
    assert abs(float(elbo(log_w)) - (gaussian.log_evidence() - gap)) < 4 * float(log_w.std()) / 8000**0.5 + 0.005


def test_with_the_true_posterior_every_weight_is_the_evidence(gaussian: GaussianModel) -> None:
    # Of independent channels, so that the true posterior is diagonal too.
    spread = torch.tensor([0.4, 1.0, 2.0], dtype=torch.float64)
    model = dataclasses.replace(
        gaussian,
        prior=dataclasses.replace(gaussian.prior, covariance=torch.diag(spread)),
        loading=torch.tensor([[1.3, 0, 0], [0, 0.7, 0]], dtype=torch.float64),
    )
    log_w = gaussian_weights(model, 200, spread=1.0).total
    assert torch.allclose(log_w, torch.full_like(log_w, model.log_evidence()), atol=5e-3)


def test_iwae_rises_with_k_towards_log_p(gaussian: GaussianModel) -> None:
    log_w = gaussian_weights(gaussian, 16384, spread=1.7).total
    truth = gaussian.log_evidence()
    counts = [1, 2, 4, 16, 128, 1024]
    # Groups of K of the same draws: the standard error of their mean bound.
    groups = [iwae(log_w.reshape(-1, count)) for count in counts]
    means = [float(group.mean()) for group in groups]
    errors = [float(group.std() / len(group) ** 0.5) for group in groups]
    assert means[0] == pytest.approx(float(elbo(log_w)))
    # The same draws make the next bound: it is higher beyond chance until nothing is left to gain.
    assert all(larger > smaller for smaller, larger in itertools.pairwise(means))
    assert means[3] - means[0] > 10 * errors[0]
    assert abs(means[-1] - truth) < 4 * errors[-1] + 0.005
    for mean, error in zip(means, errors, strict=True):
        assert mean < truth + 4 * error + 0.005


def test_iwae_from_hutchinsons_estimate_is_too_much_by_what_its_noise_says(gaussian: GaussianModel) -> None:
    # The Jacobian is the same everywhere, so the estimate's error is independent of z_0, and e^T M e - tr M takes four values.
    log_w = gaussian_weights(gaussian, 16384, spread=1.0, hutchinson=True).total
    values, vectors = torch.linalg.eigh(gaussian.prior.covariance)
    integral = vectors @ torch.diag(-0.5 * values.log()) @ vectors.T
    probes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
    errors = torch.einsum("pi,ij,pj->p", probes, integral, probes) - integral.trace()
    excess = float(torch.logsumexp(errors, 0)) - math.log(len(errors))
    assert excess > 0.2
    assert float(iwae(log_w)) == pytest.approx(gaussian.log_evidence() + excess, abs=0.06)


# Cola DLM against quadrature over all its latents


INTEGRAL = LikelihoodConfig(num_samples=1000, num_steps=12, divergence="exact", batch_size=1000)


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """log p(text) of texts that fit into a block of two one-channel latents, with nothing drawn: the sum over a grid of both."""

    log_mass: Tensor  # of each grid point's cell under the prior
    log_probabilities: Tensor  # (points, 2, vocab)

    def log_p(self, tokens: list[int]) -> float:
        parts = [self.log_probabilities[:, place, token] for place, token in enumerate(tokens)]
        return float(torch.logsumexp(self.log_mass + sum(parts), 0))


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    """One channel a latent: the posterior's mean is 0, its variance here wide enough to cover the true posterior."""
    vae, dit = tiny_vae(latent_dim=1), calm(tiny_dit(txt_in_channels=1, txt_out_channels=1, block_size=2))
    with torch.no_grad():
        vae.encoder.final_layer.weight.mul_(0.2)
        vae.encoder.final_layer.bias[1] = 1.0
    return tiny_checkpoint(vae, dit)


@pytest.fixture(scope="module")
def quadrature(small: Checkpoint) -> Quadrature:
    assert small.dit is not None
    axis = torch.linspace(-7, 7, 57)
    z_0 = torch.cartesian_prod(axis, axis)[..., None]
    log_prior = block_log_densities(small.dit, z_0, INTEGRAL).sum(1)
    return Quadrature(log_prior + 2 * math.log(float(axis[1] - axis[0])), small.vae.decode(z_0).log_softmax(-1).double())


@pytest.mark.parametrize("tokens", [[7], [21], [7, 12]])
def test_iwae_comes_to_the_integral_over_all_latents_whether_a_block_is_full_or_filled(
    small: Checkpoint, quadrature: Quadrature, tokens: list[int]
) -> None:
    (found,) = log_likelihoods(small, [Row(tokens, key=5)], INTEGRAL)
    truth = quadrature.log_p(tokens)
    assert found.iwae is not None
    assert found.standard_error is not None
    assert found.iwae == pytest.approx(truth, abs=0.05)
    assert found.log_p < truth - 0.1
    assert found.num_tokens == len(tokens)
    assert found.log_p == pytest.approx(sum(x for x in (found.reconstruction, found.prior, found.entropy) if x is not None))


def test_the_integrals_over_all_texts_of_a_token_add_up_to_1(quadrature: Quadrature) -> None:
    assert sum(math.exp(quadrature.log_p([token])) for token in range(29)) == pytest.approx(1, abs=2e-3)


def test_the_parts_are_those_of_a_slow_loop() -> None:
    checkpoint, tokens = cola(), texts(6)[0]
    assert checkpoint.dit is not None
    (found,) = log_likelihoods(checkpoint, [Row(tokens, key=9)], FAST)
    filled = torch.tensor([[*tokens, EOS, EOS]])
    posterior = checkpoint.vae.encode(filled)
    reconstruction, prior, entropy = [], [], []
    for number in range(2):
        at = {"rows": [Row(tokens, key=9)], "draws": [Draw(0, number)], "count": 32, "device": torch.device("cpu")}
        eps = draws_at(normal, 0, Purpose.LIKELIHOOD_EPS, **at).reshape(1, 8, 4)  # type: ignore[arg-type]
        probe = draws_at(torch_signs, 0, Purpose.LIKELIHOOD_PROBE, **at).reshape(1, 8, 4)  # type: ignore[arg-type]
        z_0 = posterior.mean + (0.5 * posterior.logvar).exp() * eps
        log_probabilities = checkpoint.vae.decode(z_0).log_softmax(-1)[0]
        reconstruction.append(sum(float(log_probabilities[place, token]) for place, token in enumerate(tokens)))
        prior.append(float(block_log_densities(checkpoint.dit, z_0, FAST, probe=probe).sum()))
        q = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
        entropy.append(-float(q.log_prob(z_0).sum()))
    assert found.reconstruction == pytest.approx(sum(reconstruction) / 2, abs=1e-3)
    assert found.prior == pytest.approx(sum(prior) / 2, abs=1e-3)
    assert found.entropy == pytest.approx(sum(entropy) / 2, abs=1e-3)
    one, other = (sum(parts) for parts in zip(reconstruction, prior, entropy, strict=True))
    assert found.standard_error == pytest.approx(abs(one - other) / 2, abs=1e-3)
    assert found.iwae == pytest.approx(float(torch.tensor([one, other]).logsumexp(0)) - math.log(2), abs=1e-3)


def torch_signs(*address: Any) -> Tensor:
    from cola_train.randomness import uniform

    return torch.where(uniform(*address) < 0.5, -1.0, 1.0)


def test_padding_within_a_row_is_not_scored() -> None:
    checkpoint, tokens = cola(), texts(8)[0]
    padded = [*tokens[:6], PAD, PAD]
    (found,) = log_likelihoods(checkpoint, [Row(padded, key=1)], FAST)
    assert found.num_tokens == 6
    weights = LatentWeights(checkpoint, [Row(padded, key=1), Row(tokens, key=1)], FAST)
    assert weights._scored(0) == [True] * 6 + [False] * 2
    assert weights._scored(1) == [True] * 8


@pytest.mark.parametrize("patch_size", [1, 2])
def test_documents_apart_are_texts_of_their_own(patch_size: int) -> None:
    checkpoint, block = cola(patch_size=patch_size), 4 * patch_size
    tokens = texts(3 * block)[0]
    (whole,) = log_likelihoods(checkpoint, [Row(tokens, 1, [0] * block + [1] * 2 * block)], FAST)
    exact = dataclasses.replace(FAST, num_samples=64, divergence="exact")
    (apart,) = log_likelihoods(checkpoint, [Row(tokens, 1, [0] * block + [1] * 2 * block)], exact)
    first, second = log_likelihoods(checkpoint, [Row(tokens[:block], 1), Row(tokens[block:], 1)], exact)
    assert whole.num_tokens == 3 * block
    # The first document's draws are those of the row's beginning, the second's are others.
    assert first.standard_error is not None
    assert second.standard_error is not None
    assert abs(apart.log_p - first.log_p - second.log_p) < 5 * (first.standard_error + second.standard_error)
    (first_again,) = log_likelihoods(
        checkpoint, [Row(tokens, 1, [0] * block + [1] * 2 * block)], dataclasses.replace(exact, num_samples=1)
    )
    assert first_again.log_p != apart.log_p


# Families alike


def checkpoints() -> dict[str, Checkpoint | BaselineCheckpoint]:
    return {"cola": cola(), "ar": tiny_baseline(causal=True), "llada": tiny_baseline(causal=False)}


@pytest.mark.parametrize("family", ["cola", "ar", "llada"])
def test_a_row_gets_what_it_gets_alone_in_any_batch_and_order(family: str) -> None:
    checkpoint = checkpoints()[family]
    rows = [Row(tokens, key=3 * number, given=number % 2) for number, tokens in enumerate(texts(7, 8, 5, 8, 13))]
    together = log_likelihoods(checkpoint, rows, dataclasses.replace(FAST, num_samples=3, batch_size=4))
    backwards = log_likelihoods(checkpoint, rows[::-1], dataclasses.replace(FAST, num_samples=3, batch_size=32))[::-1]
    alone = [log_likelihoods(checkpoint, [row], dataclasses.replace(FAST, num_samples=3, batch_size=1))[0] for row in rows]
    for one, other, third in zip(together, backwards, alone, strict=True):
        assert numbers(one) == pytest.approx(numbers(other), abs=1e-3)
        assert numbers(one) == pytest.approx(numbers(third), abs=1e-3)
    assert len({round(found.log_p, 2) for found in together}) == len(rows)


def numbers(found: RowLikelihood) -> list[float]:
    return [value for value in dataclasses.astuple(found) if value is not None]


def test_dopri5_depends_on_the_batch_within_its_tolerance_only() -> None:
    checkpoint, rows = cola(), [Row(tokens, key) for key, tokens in enumerate(texts(8, 8, 8))]
    config = LikelihoodConfig(num_samples=1, solver="dopri5", rtol=1e-3, atol=1e-3)
    together = [found.log_p for found in log_likelihoods(checkpoint, rows, config)]
    alone = [log_likelihoods(checkpoint, [row], config)[0].log_p for row in rows]
    assert together == pytest.approx(alone, abs=0.1)


@pytest.mark.parametrize("family", ["cola", "llada"])
def test_the_key_the_seed_and_k_decide_the_draws(family: str) -> None:
    checkpoint, tokens = checkpoints()[family], texts(8)[0]

    def log_p(key: int, seed: int = 0, num_samples: int = 2) -> float:
        config = dataclasses.replace(FAST, seed=seed, num_samples=num_samples)
        return log_likelihoods(checkpoint, [Row(tokens, key)], config)[0].log_p

    assert len({log_p(1), log_p(2), log_p(1, seed=1), log_p(1, num_samples=1)}) == 4
    assert log_p(2**62 + 5) == log_p(2**62 + 5)


def test_draws_are_the_same_whatever_the_length() -> None:
    rows, cpu = [Row([5], key=7)], torch.device("cpu")
    long, short = (draws_at(normal, 3, Purpose.LIKELIHOOD_EPS, rows, [Draw(0, 0), Draw(0, 4095)], count, cpu) for count in (50, 20))
    assert torch.equal(long[:, :20], short)
    assert not torch.equal(long[0], long[1])


def test_batches_hold_all_draws_once_and_one_width_each() -> None:
    widths = [4, 8, 4, 8, 12]
    found = list(batches(widths, num_draws=3, batch_size=4))
    assert sorted(draw for batch in found for draw in batch) == [Draw(row, number) for row in range(5) for number in range(3)]
    assert [widths[batch[0].row] for batch in found] == [12, 8, 8, 4, 4]
    assert all(len({widths[draw.row] for draw in batch}) == 1 and len(batch) <= 4 for batch in found)


# Conditional scores


def test_colas_score_is_the_difference_of_two_elbos_on_the_same_draws() -> None:
    checkpoint, (prompt, continuation) = cola(), texts(5, 4)
    (score,) = conditional_scores(checkpoint, [(prompt, continuation)], FAST, [6])
    whole, part = log_likelihoods(checkpoint, [Row([*prompt, *continuation], 6), Row(prompt, 6)], FAST)
    assert score == pytest.approx(whole.log_p - part.log_p, abs=1e-4)
    (row,) = log_likelihoods(checkpoint, [Row([*prompt, *continuation], 6, given=5)], FAST)
    assert whole.iwae is not None
    assert part.iwae is not None
    assert row.iwae == pytest.approx(whole.iwae - part.iwae, abs=1e-4)
    assert row.num_tokens == 4
    assert row.log_p == pytest.approx(sum(x for x in (row.reconstruction, row.prior, row.entropy) if x is not None))


def test_noise_of_what_prompt_and_text_share_cancels() -> None:
    # 16 tokens of prompt are four whole blocks; what differs is one.
    checkpoint, (prompt, continuation) = cola(), texts(16, 4)
    config = dataclasses.replace(FAST, num_samples=16)
    (score,) = log_likelihoods(checkpoint, [Row([*prompt, *continuation], 6, given=16)], config)
    (whole,) = log_likelihoods(checkpoint, [Row([*prompt, *continuation], 6)], config)
    (block,) = log_likelihoods(checkpoint, [Row(continuation, 6)], config)
    assert score.standard_error is not None
    assert whole.standard_error is not None
    assert block.standard_error is not None
    assert score.standard_error < 2 * block.standard_error < whole.standard_error * 1.5


def test_a_prompt_that_options_share_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, (prompt, *options) = cola(), texts(5, 3, 3, 2)
    computed = []

    class Counting(LatentWeights):
        def __init__(self, checkpoint: Checkpoint, rows: list[Row], config: LikelihoodConfig) -> None:
            computed.extend(rows)
            super().__init__(checkpoint, rows, config)

    monkeypatch.setattr("cola_train.evaluation.likelihood.LatentWeights", Counting)
    conditional_scores(checkpoint, [(prompt, option) for option in options], FAST, [4] * 3)
    assert sorted(len(row.tokens) for row in computed) == [5, 7, 8, 8]
    assert latent_likelihood.LatentWeights is LatentWeights


@pytest.mark.parametrize("family", ["cola", "ar", "llada"])
def test_nothing_given_is_the_whole_likelihood(family: str) -> None:
    checkpoint, tokens = checkpoints()[family], texts(6)[0]
    (found,) = log_likelihoods(checkpoint, [Row(tokens, 8)], FAST)
    assert conditional_scores(checkpoint, [([], tokens)], FAST, [8]) == [pytest.approx(found.log_p, abs=1e-5)]


# The autoregressive model


def llama_log_p(checkpoint: BaselineCheckpoint, tokens: list[int]) -> list[float]:
    """Of each token after the end-of-text token and those before it, by transformers' Llama."""
    logits = llama_of(checkpoint.transformer)(torch.tensor([[EOS, *tokens]])).logits[0].log_softmax(-1)
    return [float(logits[place, token]) for place, token in enumerate(tokens)]


def test_an_autoregressive_models_likelihood_is_llamas() -> None:
    checkpoint = tiny_baseline(causal=True)
    for tokens in texts(1, 6, 11):
        (found,) = log_likelihoods(checkpoint, [Row(tokens, 0)], FAST)
        assert found.log_p == pytest.approx(sum(llama_log_p(checkpoint, tokens)), abs=1e-4)
        assert (found.standard_error, found.iwae, found.prior) == (0.0, None, None)
    prompt, continuation = texts(5, 4)
    (score,) = conditional_scores(checkpoint, [(prompt, continuation)], FAST, [0])
    assert score == pytest.approx(sum(llama_log_p(checkpoint, [*prompt, *continuation])[5:]), abs=1e-4)


def test_an_autoregressive_models_documents_begin_after_separators_of_their_own() -> None:
    checkpoint, tokens = tiny_baseline(causal=True), [*texts(9)[0], EOS, PAD, PAD]
    apart, first, second = log_likelihoods(
        checkpoint, [Row(tokens, 0, [0] * 4 + [1] * 8), Row(tokens[:4], 0), Row(tokens[4:10], 0)], FAST
    )
    assert apart.log_p == pytest.approx(first.log_p + second.log_p, abs=1e-4)
    assert apart.num_tokens == 10


# Masked diffusion


def enumerated_bound(checkpoint: BaselineCheckpoint, tokens: list[int], given: int = 0) -> float:
    """-E[(1/t) sum of masked tokens' nats] with the integral over t in (0, 1] of each mask's probability done by hand.

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
    config = LikelihoodConfig(num_samples=4000, batch_size=1000)
    (found,) = log_likelihoods(checkpoint, [Row(tokens, 3, given=given)], config)
    assert found.standard_error is not None
    assert 0 < found.standard_error < 0.15
    assert abs(found.log_p - enumerated_bound(checkpoint, tokens, given)) < 4 * found.standard_error
    assert (found.num_tokens, found.iwae) == (5 - given, None)


def test_a_masked_diffusion_model_of_one_token_has_no_noise() -> None:
    checkpoint = tiny_baseline(causal=False)
    found = log_likelihoods(checkpoint, [Row([token], 3) for token in range(29) if token != PAD], FAST)
    assert all(row.standard_error == 0 for row in found)
    padding = checkpoint.transformer.head(checkpoint.transformer(torch.tensor([[29]]))).softmax(-1)[0, 0, PAD]
    assert sum(math.exp(row.log_p) for row in found) == pytest.approx(1 - float(padding), abs=1e-5)


def test_a_masked_diffusion_models_documents_and_padding_stay_apart() -> None:
    checkpoint, tokens = tiny_baseline(causal=False), texts(3)[0]
    config = LikelihoodConfig(num_samples=3000, batch_size=1000)
    padded = Row([*tokens, PAD, PAD], 3, [0] * 3 + [1] * 2)
    (found,) = log_likelihoods(checkpoint, [padded], config)
    assert found.standard_error is not None
    assert abs(found.log_p - enumerated_bound(checkpoint, tokens)) < 4 * found.standard_error


# What is refused


def test_a_vae_alone_is_refused() -> None:
    with pytest.raises(UserError, match="holds a VAE only; likelihood needs the DiT of stage 2"):
        log_likelihoods(tiny_checkpoint(tiny_vae(), None), [Row([5], 0)], FAST)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], 0), "Row 1 has no token to score: give it at least one that is not padding."),
        (Row([PAD, PAD], 0), "Row 1 has no token to score"),
        (Row([5, 6], 0, given=2), "at least one that is not padding after the given ones"),
        (Row([5, 29], 0), r"Row 1 has id 29, outside the vocabulary, 0\.\.28; encode it with the checkpoint's own tokenizer"),
        (Row([5, -1], 0), "Row 1 has id -1"),
        (Row([5], -1), r"Row 1 has key -1; keys .* must be in \[0, 2\^63\)"),
    ],
)
@pytest.mark.parametrize("family", ["cola", "ar"])
def test_rows_that_cannot_be_scored_are_refused(family: str, row: Row, message: str) -> None:
    with pytest.raises(UserError, match=message):
        log_likelihoods(checkpoints()[family], [Row([5], 0), row], FAST)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_samples": 0}, r"num_samples must be in 1\.\.4096, not 0"),
        ({"num_samples": 4097}, "num_samples must be in"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"rtol": 0.0}, r"rtol must be in \(0, 1\), not 0"),
        ({"atol": 1.0}, r"atol must be in \(0, 1\), not 1"),
        ({"num_rows": 0}, "num_rows must be at least 1, or null, not 0"),
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), not -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LikelihoodConfig(**setting)

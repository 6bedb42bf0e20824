"""The codebook head against Bayes' rule, code by code, and a DiT that has one."""

import math

import pytest
import torch
from torch import Tensor

from cola_train.config.settings import UserError
from cola_train.models import codebook_head
from cola_train.models.codebook_head import CodebookHead
from cola_train.models.config import DiTConfig, check_pair
from cola_train.models.modulation import Times
from tests.helpers.compare import assert_near
from tests.helpers.tiny import DIT_CONFIG, VAE_CONFIG, randomize, tiny_dit

VOCAB, CHANNELS, WIDTH = 7, 3, 5


def random_head(vocab: int = VOCAB) -> CodebookHead:
    generator = torch.Generator().manual_seed(3)
    head = randomize(CodebookHead(WIDTH, CHANNELS, vocab), 4)
    head.codes.copy_(torch.randn(head.codes.shape, generator=generator))
    head.log_p.copy_(torch.randn(vocab, generator=generator).log_softmax(0))
    head.variance.copy_(torch.tensor([0.02, 0.1, 0.4]))
    return head


def inputs(rows: int = 2, seq: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(rows, seq, WIDTH, generator=generator)
    z_t = torch.randn(rows, seq, CHANNELS, generator=generator)
    t = torch.rand(rows, seq, generator=generator)
    t[0, 0], t[1, 1] = 1.0, 1e-3
    return hidden, z_t, t, torch.randint(VOCAB, (rows, seq), generator=generator)


def by_bayes(head: CodebookHead, hidden: Tensor, z_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Velocity and log p(k | z_t, history) of one position, in fp64, from densities."""
    logits = head.proj(hidden).double() + head.log_p.double()
    prior, z, variance = logits.softmax(0), z_t.double(), head.variance.double()
    noised = (1 - t) ** 2 * variance + t**2
    joint, means = [], []
    for k, code in enumerate(head.codes.double()):
        away = z - (1 - t) * code
        density = (-0.5 * away.square() / noised).exp() / (2 * math.pi * noised).sqrt()
        joint.append(prior[k] * density.prod())
        means.append(code + (1 - t) * variance / noised * away)
    posterior = torch.stack(joint) / torch.stack(joint).sum()
    clean = (posterior[:, None] * torch.stack(means)).sum(0)
    return (z - clean) / t, posterior.log()


def test_velocity_and_nats_are_those_of_bayes_rule() -> None:
    head, (hidden, z_t, t, targets) = random_head(), inputs()
    with torch.no_grad():
        velocity, nats = head(hidden, z_t, t, targets)
        assert nats is not None
        for row, place in torch.cartesian_prod(torch.arange(2), torch.arange(4)).tolist():
            at = row, place
            wanted, log_posterior = by_bayes(head, hidden[at], z_t[at], float(t[at]))
            assert_near(velocity[at].double(), wanted, 2e-4)
            assert_near(nats[at].double(), -log_posterior[targets[at]], 2e-4)
        assert head(hidden, z_t, t)[1] is None


def test_at_the_ends_of_the_path_the_velocity_is_finite_and_right() -> None:
    head, (hidden, z_t, _, _) = random_head(), inputs()
    with torch.no_grad():
        # z_1 - z_0 given z_0, and given a z_1 that tells nothing of z_0.
        assert_near(head(hidden, z_t, torch.zeros(2, 4))[0], -z_t, 1e-5)
        prior = (head.proj(hidden) + head.log_p).softmax(-1)
        assert_near(head(hidden, z_t, torch.ones(2, 4))[0], z_t - prior @ head.codes, 1e-5)


def test_parts_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (1 << 24, 3 * VOCAB):
        monkeypatch.setattr(codebook_head, "_MOST_LOGITS", most)
        head, (hidden, z_t, t, targets) = random_head(), inputs()
        hidden.requires_grad_()
        velocity, nats = head(hidden, z_t, t, targets)
        (velocity.square().sum() + nats.sum()).backward()
        assert hidden.grad is not None
        found.append([velocity, nats, hidden.grad, head.proj.weight.grad, head.proj.bias.grad])
    for whole, parts in zip(*found, strict=True):
        assert_near(parts, whole, 1e-5)


def test_a_dit_gives_its_codebooks_velocity() -> None:
    dit = tiny_dit(head="codebook", vocab_size=VAE_CONFIG.vocab_size)
    assert dit.codebook is not None
    assert "txt_out.proj.weight" not in dit.state_dict()
    generator = torch.Generator().manual_seed(6)
    dit.codebook.codes.normal_(generator=generator)
    z_0, z_t = torch.randn(2, 2, 8, 4, generator=generator)
    times = Times(torch.tensor([0.3, 0.7, 0.0]), torch.tensor([[0] * 8, [1] * 8]))
    tokens = torch.randint(VAE_CONFIG.vocab_size, (2, 8), generator=generator)
    with torch.no_grad():
        alone = dit.velocity(z_t, z_0, times)
        velocity, nats = dit.velocity_and_nats(z_t, z_0, times, tokens)
        assert torch.equal(alone, velocity)
        assert nats.shape == (2, 8)
        # What its head knows changes both.
        dit.codebook.proj.bias[int(tokens[0, 0])] += 3
        assert dit.velocity_and_nats(z_t, z_0, times, tokens)[1][0, 0] < nats[0, 0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"head": "codebook"}, r"vocab_size \(None\) .* with head=codebook it must be vae\.vocab_"),
        ({"vocab_size": 9}, r"vocab_size \(9\) .* with head=velocity it must be null"),
        ({"embeds_codes": True}, r"embeds_codes = True is not supported: head=velocity knows no"),
    ],
)
def test_a_head_and_its_codes_go_together(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DiTConfig(**changes)  # type: ignore[arg-type]


def test_codes_are_of_the_vaes_tokens() -> None:
    codes = {"head": "codebook", "vocab_size": 30, "embeds_codes": True}
    fields = {**DIT_CONFIG.to_json(), **codes}
    dit = DiTConfig.from_json(fields, "config.json")
    assert dit.to_json() == fields
    with pytest.raises(UserError, match=r"dit\.vocab_size \(30\) must equal vae\.vocab_size \(29"):
        check_pair(VAE_CONFIG, dit)
    with pytest.raises(UserError, match=r"field 'head' must be of type .*codebook.*, not 'tokens'"):
        DiTConfig.from_json({**fields, "head": "tokens"}, "config.json")

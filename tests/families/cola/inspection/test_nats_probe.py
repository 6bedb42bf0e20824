"""Nats in an inspection: those of `likelihood`, of tables in the DiT's place, and of bytes."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cola_train.config.evaluation import InspectionConfig, LikelihoodConfig
from cola_train.data.packing import TRAIN, VALIDATION
from cola_train.data.prepared import PreparedData
from cola_train.data.tokenizer import Tokenizer
from cola_train.evaluation.likelihood.likelihood import log_likelihoods
from cola_train.evaluation.likelihood.perplexity import held_out_rows
from cola_train.evaluation.likelihood.rates import perplexity_of
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.inspection.inspection import inspect_latents
from cola_train.families.cola.inspection.latent_rows import latent_rows
from cola_train.families.cola.inspection.nats_probe import Nats, NatsTally
from cola_train.families.cola.yardsticks.reading import Statistics, read_statistics
from tests.families.cola.inspection.test_yardstick_probe import SIZE, KnowingDiT
from tests.helpers.tiny import calm, tiny_checkpoint, tiny_dit, tiny_tokenizer, tiny_vae

QUICK = InspectionConfig(
    num_rows=7, batch_size=3, num_times=2, num_steps=1, map_latents=60, elbo_draws=3
)


@pytest.fixture(scope="module")
def data(prepared_folder: Path) -> PreparedData:
    return PreparedData.open(prepared_folder)


def of_data(data: PreparedData, **vae: Any) -> ColaCheckpoint:
    """A random checkpoint with the data's tokenizer."""
    network = calm(tiny_vae(vocab_size=data.manifest.vocab_size, **vae))
    return dataclasses.replace(tiny_checkpoint(network, calm(tiny_dit())), tokenizer=data.tokenizer)


def nats_of(checkpoint: ColaCheckpoint, data: PreparedData) -> Nats:
    *_, found = inspect_latents(checkpoint, data, QUICK)
    assert found is not None
    assert found.nats is not None
    return found.nats


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_bound_is_that_of_the_likelihood_verb(data: PreparedData, patch_size: int) -> None:
    checkpoint = of_data(data, patch_size=patch_size)
    found = nats_of(checkpoint, data)
    rows = held_out_rows(data, QUICK.num_rows, mask_documents=False)
    config = LikelihoodConfig(num_samples=QUICK.elbo_draws)
    likelihoods = log_likelihoods(checkpoint, rows, config)
    expected = perplexity_of(checkpoint, likelihoods, config)
    metrics = found.metrics()
    assert metrics["elbo_nats_per_token"] == pytest.approx(expected.nats.nats_per_token, rel=1e-5)
    assert found.reconstruction == pytest.approx(expected.parts["reconstruction"], rel=1e-5)
    assert expected.nats.standard_error is not None
    # Rows drawn anew, as against a formula to first order.
    error = metrics["elbo_nats_per_token_standard_error"]
    assert error == pytest.approx(expected.nats.standard_error, rel=0.25)
    whole = found.models["elbo"].per_token
    assert whole.low < whole.mean < whole.high
    assert ("elbo_bigram" in found.models) == (patch_size == 1)


def test_a_byte_has_a_tokens_nats_by_how_many_they_are(data: PreparedData) -> None:
    found = nats_of(of_data(data), data)
    rows = [data.row(VALIDATION, row)[0] for row in range(QUICK.num_rows)]
    text = [data.tokenizer.decode(row[row != data.manifest.pad_token_id]) for row in rows]
    tokens = np.concatenate(rows)
    assert found.num_tokens == (tokens != data.manifest.pad_token_id).sum()
    assert found.num_bytes == sum(len(part.encode()) for part in text)
    assert len(found.models) == 6
    for name, model in found.models.items():
        assert model.per_byte is not None
        by_byte = model.per_token.mean * found.num_tokens / found.num_bytes
        assert model.per_byte.mean == pytest.approx(by_byte, rel=1e-12)
        assert found.metrics()[f"{name}_nats_per_byte"] == pytest.approx(by_byte, rel=1e-12)
        if name != "elbo":
            assert model.elbo_less_it is not None
            less = found.models["elbo"].per_token.mean - model.per_token.mean
            assert model.elbo_less_it.mean == pytest.approx(less, rel=1e-9)
    assert found.models["uniform"].per_token.mean == pytest.approx(np.log(320))


def test_the_tables_own_nats_are_counted_one_by_one(data: PreparedData) -> None:
    found = nats_of(of_data(data), data)
    count = np.bincount(
        np.concatenate([data.row(TRAIN, row)[0] for row in range(data.num_rows(TRAIN))]),
        minlength=320,
    )
    count[data.manifest.pad_token_id] = 0
    log_p = np.log((count + 0.5) / (count + 0.5).sum())
    tokens = np.concatenate([data.row(VALIDATION, row)[0] for row in range(QUICK.num_rows)])
    real = tokens[tokens != data.manifest.pad_token_id]
    unigram = found.models["unigram"].per_token.mean
    assert unigram == pytest.approx(-log_p[real].mean(), rel=1e-5)
    assert found.models["bigram"].per_token.mean < unigram < np.log(320)


def tallied(data: PreparedData, make_dit: Callable[[Statistics], Any]) -> Nats:
    """What is found with a DiT that is made of the yardsticks' statistics."""
    vae = calm(tiny_vae(vocab_size=data.manifest.vocab_size)).eval()
    channels, last = vae.config.latent_dim, vae.encoder.final_layer
    with torch.no_grad():
        # Latents that tell their token: a log variance of -3.
        last.weight[channels:].zero_()
        last.bias[channels:].fill_(-3.0)
        known = read_statistics(vae, data, None, 8, mask_documents=False)
        dit = make_dit(known)
        tally = NatsTally(vae, dit, data.tokenizer, known.bigram, known.codebook, 2, 0)
        for rows in latent_rows(vae, data, QUICK):
            dit.rows = rows
            tally.add(rows)
    return tally.result()


def knowing_dit(known: Statistics, order: str, worse: float) -> Any:
    """A DiT whose velocity is a table's, worse by a given one."""
    dit: Any = tiny_dit(block_size=SIZE)
    table = KnowingDiT(known, order, worse)

    def velocity(*given: Any) -> Any:
        table.rows = dit.rows
        return table.velocity(*given)

    dit.velocity = velocity
    return dit


def test_a_dit_that_is_a_table_has_its_bound(data: PreparedData) -> None:
    for order in ("unigram", "bigram"):
        found = tallied(data, functools.partial(knowing_dit, order=order, worse=0.0))
        same = found.models[f"elbo_{order}"]
        assert same.per_token.mean == pytest.approx(found.models["elbo"].per_token.mean, rel=1e-6)
        assert same.elbo_less_it is not None
        assert dataclasses.astuple(same.elbo_less_it) == pytest.approx((0, 0, 0, 0), abs=1e-5)
    worse = tallied(data, functools.partial(knowing_dit, order="bigram", worse=0.3))
    less = worse.models["elbo_bigram"].elbo_less_it
    assert less is not None
    assert less.low > 0.1


def codebook_dit(known: Statistics, learned: bool) -> Any:
    """A DiT that ends in the yardsticks' codes, with random logits or none."""
    dit = tiny_dit(head="codebook", vocab_size=320, block_size=SIZE).eval()
    assert dit.codebook is not None
    with torch.no_grad():
        dit.codebook.proj.weight.mul_(30.0 if learned else 0.0)
        for field in dataclasses.fields(known.codebook):
            getattr(dit.codebook, field.name).copy_(getattr(known.codebook, field.name))
    return dit


def test_a_codebook_head_that_has_learned_nothing_is_the_unigram_yardstick(
    data: PreparedData,
) -> None:
    same, other = (
        tallied(data, functools.partial(codebook_dit, learned=learned)).models["elbo_unigram"]
        for learned in (False, True)
    )
    assert same.elbo_less_it is not None
    assert other.elbo_less_it is not None
    # At the highest level a latent's error in fp32 weighs some thousand times.
    assert dataclasses.astuple(same.elbo_less_it) == pytest.approx((0, 0, 0, 0), abs=0.02)
    assert other.elbo_less_it.low > 0.05


def test_padding_has_no_part_in_it(data: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that end in whole blocks of padding have the nats of what stands before."""
    checkpoint, whole = of_data(data), PreparedData.row

    def padded(self: PreparedData, split: str, number: int) -> tuple[Any, Any]:
        tokens, documents = (part.copy() for part in whole(self, split, number))
        tokens[-2 * SIZE :] = self.manifest.pad_token_id
        return tokens, documents

    with monkeypatch.context() as patch:
        patch.setattr(PreparedData, "row", padded)
        found = nats_of(checkpoint, data)
    assert found.num_tokens == QUICK.num_rows * (data.manifest.seq_len - 2 * SIZE)
    rows = held_out_rows(data, QUICK.num_rows, mask_documents=False)
    cut = [dataclasses.replace(row, tokens=row.tokens[: -2 * SIZE]) for row in rows]
    config = LikelihoodConfig(num_samples=QUICK.elbo_draws)
    likelihoods = log_likelihoods(checkpoint, cut, config)
    per_token = -sum(row.log_p for row in likelihoods) / found.num_tokens
    # Levels are of each block, however many follow it.
    assert found.metrics()["elbo_nats_per_token"] == pytest.approx(per_token, rel=1e-5)
    assert found.num_bytes == sum(len(data.tokenizer.decode(row.tokens).encode()) for row in cut)


def test_bytes_that_are_not_known_are_not_guessed(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "are not available" not in nats_of(of_data(data), data).table()
    monkeypatch.setattr(Tokenizer, "num_bytes", lambda *_: None)
    found = nats_of(of_data(data), data)
    assert found.num_bytes is None
    assert not any("per_byte" in name for name in found.metrics())
    assert "text that is not known; 3 draws" in found.table()
    assert "Nats a byte are not available: these tokens have no text, or one" in found.table()


def test_unknown_tokens_have_no_bytes() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.num_bytes([5, 6, 0]) == len("w5 w6")
    assert tokenizer.num_bytes(tokenizer.encode("w5 Fanny")) is None


def test_the_table_has_a_line_of_figures_and_one_of_words_for_each(data: PreparedData) -> None:
    found = nats_of(of_data(data), data)
    lines = found.table().split("\n")
    assert len(lines) == 2 + 2 * len(found.models)
    for name, model, line in zip(found.models, found.models.values(), lines[2:], strict=False):
        assert f" {model.per_token.mean:.3f} " in line, name
        assert model.per_byte is not None
        assert f" {model.per_byte.mean:.4f}" in line
        assert (model.elbo_less_it is None) == (name == "elbo")
    assert f"{found.num_tokens:,} tokens, {found.num_bytes:,} bytes; 3 draws" in lines[0]

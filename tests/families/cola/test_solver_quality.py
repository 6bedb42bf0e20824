"""Quality against steps, on random networks: against generations made apart."""

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

from cola_train import SamplerConfig, generate
from cola_train.bench.config import BenchQualityConfig
from cola_train.bench.quality import run_quality
from cola_train.config.settings import UserError
from cola_train.families.checkpoint import SolverQuality
from cola_train.families.cola.checkpoint import ColaCheckpoint
from cola_train.families.cola.solver_quality import REFERENCE_SOLVER, compare_solvers
from tests.helpers.tiny import calm, random_tokens, tiny_checkpoint, tiny_dit, tiny_vae

CONFIG = SamplerConfig(
    max_new_tokens=4, guidance_scale=2.0, eos_token_ids=(), repetition_penalty=1.0, seed=3
)


@functools.cache
def tiny(patch_size: int = 1) -> ColaCheckpoint:
    return tiny_checkpoint(calm(tiny_vae(patch_size=patch_size)), calm(tiny_dit()))


def prompts(*lengths: int) -> list[list[int]]:
    return [random_tokens(1, length, seed=length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("patch_size", [1, 2])
def test_one_block_is_compared_as_two_generations_are(patch_size: int) -> None:
    """Prompts of whole blocks and one block more: nothing is known of it, and no history
    differs.
    """
    block = 4 * patch_size
    some, config = prompts(0, block, 2 * block), dataclasses.replace(CONFIG, max_new_tokens=block)
    (row,) = compare_solvers(tiny(patch_size), some, config, ["euler"], [3], reference_steps=20)
    few = generate(tiny(patch_size), some, dataclasses.replace(config, num_steps=3))
    many = generate(
        tiny(patch_size), some, dataclasses.replace(config, solver=REFERENCE_SOLVER, num_steps=20)
    )
    differences = torch.cat(
        [one.latents - other.latents for one, other in zip(few, many, strict=True)]
    )
    assert row.latent_rms_error == pytest.approx(
        float(differences.square().mean().sqrt()), rel=1e-4
    )
    equal = [
        a == b
        for one, other in zip(few, many, strict=True)
        for a, b in zip(one.token_ids, other.token_ids, strict=True)
    ]
    assert row.token_agreement == sum(equal) / len(equal)
    assert (row.solver, row.num_steps, row.network_calls) == ("euler", 3, 3)
    assert row.cpu_seconds_per_sample > 0


def test_more_steps_are_nearer_and_batches_do_not_matter() -> None:
    some, config = prompts(4, 8, 0, 12), dataclasses.replace(CONFIG, max_new_tokens=8)
    rows = compare_solvers(tiny(), some, config, ["euler", "heun"], [2, 32], reference_steps=64)
    assert [(row.solver, row.num_steps, row.network_calls) for row in rows] == [
        ("euler", 2, 2),
        ("euler", 32, 32),
        ("heun", 2, 3),
        ("heun", 32, 63),
    ]
    errors = [row.latent_rms_error for row in rows]
    assert errors[0] > 2 * errors[1] > 0
    assert errors[2] > 2 * errors[3] > 0
    in_pairs = compare_solvers(
        tiny(), some, dataclasses.replace(config, batch_size=2), ["euler"], [2], reference_steps=64
    )
    assert in_pairs[0].latent_rms_error == pytest.approx(errors[0], rel=1e-3)


def test_the_reference_is_no_distance_from_itself() -> None:
    (row,) = compare_solvers(
        tiny(), prompts(5, 6), CONFIG, [REFERENCE_SOLVER], [8], reference_steps=8
    )
    assert (row.latent_rms_error, row.token_agreement) == (0.0, 1.0)


def test_the_share_of_distinct_4grams_is_of_whole_texts() -> None:
    """The reference's own solver and steps write the reference's texts, of two blocks each."""
    some, config = prompts(4, 8, 0), dataclasses.replace(CONFIG, max_new_tokens=8, batch_size=2)
    exact = dataclasses.replace(config, solver=REFERENCE_SOLVER, num_steps=8)
    texts = [result.token_ids for result in generate(tiny(), some, exact)]
    grams = [tuple(text[place : place + 4]) for text in texts for place in range(5)]
    (row,) = compare_solvers(tiny(), some, config, [REFERENCE_SOLVER], [8], reference_steps=8)
    assert row.distinct_4gram_share == len(set(grams)) / len(grams)
    # No noise and equal prompts: the same text each time.
    still = dataclasses.replace(config, noise_scale=0.0)
    alone, (six,) = (
        compare_solvers(tiny(), [[5] * 4] * count, still, ["euler"], [8], reference_steps=16)
        for count in (1, 6)
    )
    assert six.distinct_4gram_share == pytest.approx(alone[0].distinct_4gram_share / 6)


def test_the_table_has_a_line_for_each_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [SolverQuality("heun", 4, 7, 0.12345, 0.875, 1.5, 0.9876)]
    tiny().save(tmp_path / "tiny")
    monkeypatch.setattr(ColaCheckpoint, "compare_solvers", lambda *arguments: rows)
    found = run_quality(tmp_path / "tiny", BenchQualityConfig(num_prompts=2), "cpu")
    assert found["rows"] == [dataclasses.asdict(row) for row in rows]
    head, rule, line = (
        line for line in capsys.readouterr().err.splitlines() if line.startswith("|")
    )
    assert line == "| heun | 4 | 7 | 0.123 | 87.5% | 1.500 | 0.988 |"
    assert head.count("|") == rule.count("|") == line.count("|")


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="There are no prompts to continue"):
        compare_solvers(tiny(), [], CONFIG, ["euler"], [2], 4)
    with pytest.raises(UserError, match=r"There is no solver 'oiler'; did you mean 'euler'\?"):
        compare_solvers(tiny(), prompts(3), CONFIG, ["oiler"], [2], 4)
    with pytest.raises(UserError, match="This checkpoint holds a VAE only"):
        compare_solvers(tiny_checkpoint(tiny_vae(), None), prompts(3), CONFIG, ["euler"], [2], 4)

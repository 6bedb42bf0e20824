"""Our arithmetic against figures of our own that lie in tests/golden: a clone alone proves it, with
no reference beside it.

They were written by this code when it agreed with the released code (tests/golden/README.md). A red
test here means that the arithmetic has changed; making the set anew is not the cure.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cola_train.families.autoregressive.checkpoint import AutoregressiveCheckpoint
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.cola.checkpoint import ColaCheckpoint
from tests.golden import computed, families, make
from tests.golden.families import BASELINES, COLA, FAMILIES, FOLDER, AnyCheckpoint

# Of a tensor's largest value, or of a scalar; integers and ids are compared exactly. Another CPU's
# kernels add in another order: between those of SSE4.1 and of AVX2 the largest difference in any
# tensor here was 1.2e-6, in the initial weights (erfinv is a vector kernel) 1.3e-6, in a gradient's
# norm 5.6e-6, since gradients add up terms that cancel.
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5

OBJECTIVES = [(family, name) for family in FAMILIES for name in families.objectives(family)]
SAMPLERS = [(family, name) for family in FAMILIES for name in families.samplers(family)]


@functools.cache
def stored_checkpoint(family: str) -> AnyCheckpoint:
    return Checkpoint.load(FOLDER / family)


@functools.cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@functools.cache
def fields(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def differing(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> list[str]:
    """Which tensors are not the expected ones, with how far they are off."""
    found = [f"{name}: only in one of the two" for name in actual.keys() ^ expected.keys()]
    for name in actual.keys() & expected.keys():
        ours, theirs = actual[name], expected[name]
        if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            found.append(
                f"{name}: {ours.dtype} {tuple(ours.shape)}, expected {theirs.dtype} "
                f"{tuple(theirs.shape)}"
            )
        elif not ours.is_floating_point():
            if not torch.equal(ours, theirs):
                found.append(f"{name}: {int((ours != theirs).sum())} of {ours.numel()} differ")
        elif ours.numel():
            off = float((ours.detach().double() - theirs.double()).abs().max())
            if not off <= tolerance * float(theirs.abs().max()):
                found.append(
                    f"{name}: off by {off:.3g}, largest value {float(theirs.abs().max()):.3g}"
                )
    return sorted(found)


def differing_numbers(
    actual: Mapping[str, float], expected: Mapping[str, float], tolerance: float
) -> list[str]:
    as_tensors = (
        {name: torch.tensor(value, dtype=torch.float64) for name, value in side.items()}
        for side in (actual, expected)
    )
    return differing(*as_tensors, tolerance)


# The set itself


def test_files_are_those_that_were_made() -> None:
    """An edited figure, or one that git's line endings changed, is no evidence."""
    kept = {
        path.relative_to(FOLDER).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FOLDER.rglob("*")
        if path.is_file()
        and path.suffix in (".json", ".safetensors")
        and path != FOLDER / "made.json"
    }
    assert kept == fields("made")["sha256"]
    assert fields("made")["comparisons_with_the_reference"] > 0
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < make.MAX_BYTES


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_inputs_are_functions_of_seed_and_name(family: str) -> None:
    drawn, stored = families.checkpoint(family), stored_checkpoint(family)
    for name, network in families.networks_of(drawn).items():
        assert (
            differing(network.state_dict(), families.networks_of(stored)[name].state_dict(), 1e-6)
            == []
        )
    assert differing(families.inputs(family), tensors(f"{family}/inputs"), 1e-6) == []


@pytest.mark.parametrize("family", COLA)
def test_what_the_set_distinguishes_occurs_in_it(family: str) -> None:
    outputs = tensors(f"{family}/outputs")
    for name in ("mean", "logits", "velocity/1", "velocity/2"):
        assert not torch.equal(outputs[name], outputs[f"documents/{name}"])
    for name in ("velocity/1", "documents/velocity/2"):
        assert not torch.equal(outputs[name], outputs[f"{name}/hidden_history"])
    totals = [found["figures"]["total"] for found in fields(f"{family}/losses").values()]
    # Where z_t's gradient goes changes no figure; its case is told apart by the gradients.
    assert len(set(totals)) == len(totals) - (
        "stage2_no_gradient_to_encoder" in fields(f"{family}/losses")
    )
    told = [
        result for results in fields(f"{family}/samples")["samples"].values() for result in results
    ]
    assert {result["finish_reason"] for result in told} == {"length", "stop"}
    assert any(len(set(result["decoded_ids"])) > 4 for result in told)


# Networks


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_passes(family: str) -> None:
    found = computed.forward(stored_checkpoint(family), tensors(f"{family}/inputs"))
    assert differing(found, tensors(f"{family}/outputs")) == []


def test_initial_weights() -> None:
    found, expected = (
        computed.initial_weights(
            ColaCheckpoint.load(FOLDER / "base"), AutoregressiveCheckpoint.load(FOLDER / "ar")
        ),
        dict(tensors("initial")),
    )
    theirs = {"torch/uniform": found.pop("torch/uniform")}
    changed = differing(theirs, {"torch/uniform": expected.pop("torch/uniform")}, 0.0)
    assert changed == [], (
        "torch's own generator gives other numbers than when the set was made; our arithmetic is "
        "not to blame"
    )
    assert differing(found, expected) == []


# Objectives


def test_draws() -> None:
    assert differing(computed.draws(), tensors("draws"), 1e-6) == []


@pytest.mark.parametrize(("family", "name"), OBJECTIVES)
def test_losses_and_gradients(family: str, name: str) -> None:
    settings, expected = families.objectives(family)[name], fields(f"{family}/losses")[name]
    found = computed.losses(stored_checkpoint(family), tensors(f"{family}/inputs"), settings)
    assert found["counts"] == expected["counts"]
    assert differing_numbers(found["figures"], expected["figures"], TOLERANCE) == []
    assert (
        differing_numbers(found["gradient_norms"], expected["gradient_norms"], GRADIENT_TOLERANCE)
        == []
    )


def test_every_stored_case_is_compared() -> None:
    assert [
        (family, name) for family in FAMILIES for name in fields(f"{family}/losses")
    ] == OBJECTIVES
    assert [
        (family, name) for family in FAMILIES for name in fields(f"{family}/samples")["samples"]
    ] == SAMPLERS


# Sampling


@pytest.mark.parametrize(("family", "name"), SAMPLERS)
def test_generated_ids_and_latents(family: str, name: str) -> None:
    stored = fields(f"{family}/samples")
    found, latents = computed.samples(
        stored_checkpoint(family), stored["prompts"], families.samplers(family)[name]
    )
    assert found == stored["samples"][name]
    if family in COLA:
        expected = {
            path.removeprefix(f"{name}/"): value
            for path, value in tensors(f"{family}/latents").items()
        }
        assert (
            differing(latents, {path: expected[path] for path in expected if "/" not in path}) == []
        )
    else:
        assert latents == {}


# Checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_goes_out_as_it_came_in(family: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The VAE has scaling_factor")
        stored_checkpoint(family).save(tmp_path / "out")
    written = sorted(
        path.relative_to(tmp_path / "out")
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.name != "checksums.json"
    )
    assert len(written) == (6 if family in COLA else 5)
    for path in written:
        ours, theirs = tmp_path / "out" / path, FOLDER / family / path
        if path.suffix == ".safetensors":
            assert differing(load_file(ours), load_file(theirs), 0.0) == []
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    assert sum(family in kind for kind in (COLA, BASELINES)) == 1


# What makes the set


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("assert False", "ended with 1 after 2"),
        ("__import__('pytest').skip('no reference')", "1 of them skipped"),
    ],
)
def test_nothing_is_made_unless_every_comparison_passes(
    body: str, reason: str, tmp_path: Path
) -> None:
    proof = tmp_path / "test_proof.py"
    proof.write_text(
        f"def test_one():\n    pass\n\n\ndef test_other():\n    {body}\n", encoding="utf-8"
    )
    with pytest.raises(make.Refusal, match=f"Nothing was written.*{reason}"):
        make.prove(tmp_path, [str(proof)])
    proof.write_text("def test_one():\n    pass\n", encoding="utf-8")
    assert make.prove(tmp_path, [str(proof)]) == 1


@pytest.mark.parametrize("proof", make.PROOFS)
def test_what_proves_the_code_is_there(proof: str) -> None:
    assert (Path(__file__).resolve().parents[1] / proof).is_file()


def test_nothing_is_made_without_the_reference(tmp_path: Path) -> None:
    with pytest.raises(make.Refusal, match="is absent"):
        make.prove(tmp_path / "golden", make.PROOFS)

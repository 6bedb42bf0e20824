"""What a verb's config accepts can run; what cannot is refused before torch is imported."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cola_train.cli import make_parser
from cola_train.cli.config_docs import settings_verbs
from cola_train.config.load import load_config
from cola_train.config.run import RunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import UserError
from cola_train.families.generate import generate
from cola_train.families.registry import family_named
from cola_train.scaling.plan import Fleet, make_plan, show
from cola_train.training.run import train
from tests.config.drawn import BASES, OF_OTHERS, RUNS
from tests.helpers.tiny import tiny_checkpoint, tiny_dit, tiny_vae

ROOT = Path(__file__).resolve().parents[2]
DRAWS, LEAST = 2300, 2000  # some of the draws are alike
PLANS, TWO_STEP_RUNS, SAMPLERS = 48, 6, 24
FLEET = Fleet("H100", 1, 8, 0.4, None)
CLASSES: dict[str, Any] = dict(settings_verbs(make_parser()))
Outcome = tuple[str, list[str], str | None]


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    program = [sys.executable, "-m", "tests.config.drawn", str(DRAWS)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [(verb, overrides, refusal) for verb, overrides, refusal in json.loads(done.stdout)]


def evenly(found: list[Any], number: int) -> list[Any]:
    assert len(found) >= number
    return found[:: len(found) // number][:number]


def accepted(outcomes: list[Outcome], *verbs: str) -> list[tuple[str, list[str]]]:
    return [(verb, given) for verb, given, refusal in outcomes if refusal is None and verb in verbs]


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Lets through the one refusal of a horizon in EFLOPs."""
    try:
        yield
    except UserError as error:
        if "must end before optim.decay" not in str(error):
            raise


def test_two_thousand_configs_are_accepted_or_refused_without_torch(
    outcomes: list[Outcome],
) -> None:
    assert len(outcomes) >= LEAST
    taken = Counter(verb for verb, _, refusal in outcomes if refusal is None)
    refused = Counter(verb for verb, _, refusal in outcomes if refusal is not None)
    assert taken.keys() == refused.keys() == CLASSES.keys() - {*OF_OTHERS}
    assert all(taken[verb] > 50 for verb in RUNS)
    # A refusal names a setting that was given, or the settings that it cannot stand beside.
    for verb, given, refusal in outcomes:
        changed = [text.partition("=")[0] for text in given if text not in BASES.get(verb, [])]
        names = [key.rpartition(".")[2] for key in changed]
        # A section that was switched on may have a default that this verb cannot take.
        names += [
            key.rpartition(".")[0] + "." for key in changed if key.startswith("in_loop_eval.")
        ]
        assert refusal is None or any(name in refusal for name in names), (given, refusal)


_REFUSED = """
import sys
from cola_train.cli import main
from tests.config.drawn import BASES, RUNS, forbid_torch
forbid_torch()
for verb in RUNS:
    print(verb, main([verb, *BASES[verb], f"data.path={sys.argv[1]}"]), file=sys.stderr)
"""


def test_rows_are_looked_for_without_torch(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    program = [sys.executable, "-c", _REFUSED, str(rows)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    said = done.stderr.splitlines()
    assert [line for line in said if line.split()[0] in RUNS] == [f"{verb} 2" for verb in RUNS]
    assert sum(str(rows) in line for line in said) == len(RUNS)


def test_what_is_accepted_can_be_planned(outcomes: list[Outcome]) -> None:
    for verb, given in evenly(accepted(outcomes, *RUNS), PLANS):
        config: RunConfig = load_config(family_named(verb).config, None, given)
        processes = config.parallel.num_processes
        fleet = dataclasses.replace(FLEET, count=processes)
        refused: Any = contextlib.nullcontext()
        if any("EFLOPs" in text for text in given):
            # How many steps they are only the networks say.
            refused = refusals()
        with refused:
            assert show(make_plan(config, fleet, ["1"]), as_json=True)


# Told, and right: the released sampler would not undo a drawn scale.
@pytest.mark.filterwarnings("ignore:The VAE has scaling_factor")
def test_what_is_accepted_runs(
    outcomes: list[Outcome], prepared_folder: Path, tmp_path: Path
) -> None:
    given_data = [
        (verb, given)
        for verb, given in accepted(outcomes, *RUNS)
        if given.count("data.seq_len=32") == 1
        and not any(text.startswith("data.seq_len=") for text in given[3:])
        and not any(text.startswith("parallel.num_processes=") for text in given)
        and not any("EFLOPs" in text for text in given)
        # These rows have no document_alignment.
        and not any(text.endswith("mask_documents=true") for text in given)
        and not any(text.endswith(("vocab_size=1", "vocab_size=100")) for text in given)
    ]
    for number, (verb, given) in enumerate(evenly(given_data, TWO_STEP_RUNS)):
        place = [f"data.path={prepared_folder}", f"runs_folder={tmp_path}", f"name=run{number}"]
        place += ["parallel.timeout_seconds=1800"]  # a busy machine may need more than one
        config = load_config(family_named(verb).config, None, [*given, *place])
        assert train(config).step == config.trainer.max_steps


def test_what_is_accepted_of_a_sampler_generates(outcomes: list[Outcome]) -> None:
    checkpoint = tiny_checkpoint(tiny_vae(), tiny_dit())
    known = checkpoint.vocab_size
    for _, given in evenly(accepted(outcomes, "sample"), SAMPLERS):
        config = load_config(SamplerConfig, None, given)
        config = dataclasses.replace(config, max_new_tokens=min(5, config.max_new_tokens))
        if (config.pad_token_id or 0) < known:
            assert len(generate(checkpoint, ["w5 w6"], config)[0].token_ids) <= 5
            continue
        with pytest.raises(UserError, match=r"pad_token_id: id .* is outside the vocabulary"):
            generate(checkpoint, ["w5 w6"], config)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optim.warmup=4"], r"optim.warmup \('4', 4 steps\) must end before optim.decay \('4', 4"),
        (["optim.warmup=500 tokens", "optim.decay=3 steps"], r"\('500 tokens', 4 steps\)"),
        (["trainer.precision=fp8"], "trainer.precision=fp8 needs a GPU, and .* is cpu"),
        (["parallel.strategy=single", "parallel.num_processes=2"], "is for one process, not 2"),
        (
            ["parallel.strategy=hsdp", "parallel.num_processes=2", "parallel.shard_size=3"],
            r"parallel.shard_size \(3\) must divide parallel.num_processes \(2\)",
        ),
        (["in_loop_eval.tasks=[lambda]"], r"no benchmark 'lambda' .*did you mean 'lambada'\?"),
        (
            ["in_loop_eval.benchmarks.sampler.pad_token_id=320"],
            r"sampler.pad_token_id must be below vae.vocab_size \(320\), not 320",
        ),
        (["parallel.timeout_seconds=1e12"], r"timeout_seconds must be in \[1, 31536000\]"),
        (
            ["optim.weight_decay=1e30"],
            r"optim.weight_decay \(1e\+30\) x optim.learning_rate \(0.00015\) must be at most 1",
        ),
        (["objective.fixed_log_snr=1e30"], r"fixed_log_snr must be in \[-40, 40\] or null"),
        ([f"name={'x' * 300}"], "name must have at most 200 bytes.* has 300"),
        (["runs_folder=a\0b"], "runs_folder has a NUL character"),
    ],
)
def test_what_only_failed_later_is_refused_by_the_config(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_config(CLASSES["vae"], None, [*BASES["vae"], *overrides])


def test_whole_numbers_may_be_written_with_an_exponent(
    vae_config: Callable[..., RunConfig],
) -> None:
    assert vae_config("run", "trainer.max_steps=1e3").trainer.max_steps == 1000


def test_plan_refuses_what_training_refuses() -> None:
    given = [*BASES["ar"], "optim.warmup=2 EFLOPs", "optim.decay=1 EFLOPs"]
    with pytest.raises(UserError, match=r"must end before optim\.decay"):
        make_plan(load_config(CLASSES["ar"], None, given), FLEET, [])

"""Every number has a range in its declaration: in the help, in docs/config.md and in the error."""

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest

from cola_train.cli import main, make_parser
from cola_train.cli.config_docs import settings_verbs
from cola_train.config.amounts import Amount
from cola_train.config.describe import describe
from cola_train.config.evaluation import EvaluationConfig
from cola_train.config.load import leaves, load_config
from cola_train.config.optim import OptimConfig
from cola_train.config.settings import Settings, UserError
from cola_train.config.typed import section_class, table_class
from cola_train.families.cola.config import VAERunConfig

VERBS = dict(settings_verbs(make_parser()))
DOCS = Path(__file__).resolve().parents[2] / "docs" / "config.md"
RUN = ["name=run", "data.path=rows", "vae.block_size=1"]


def classes(config_class: type) -> set[type]:
    """A config class and those of the sections in it."""
    found = {config_class}
    for field in dataclasses.fields(config_class):
        inside = section_class(field.type) or table_class(field.type)
        found |= classes(inside) if inside else set()
    return found


CLASSES = sorted({c for verb in VERBS.values() for c in classes(verb)}, key=lambda c: c.__name__)
NUMBERS = {
    f"{config_class.__name__}.{field.name}": field
    for config_class in CLASSES
    for field in dataclasses.fields(config_class)
    if re.search(r"\b(int|float)\b", str(field.type))
}


def test_there_are_many() -> None:
    assert len(CLASSES) > 25
    assert len(NUMBERS) > 140
    assert {"OptimConfig.eps", "SamplerConfig.eos_token_ids", "CurveConfig.budgets"} <= set(NUMBERS)


def test_every_config_checks_its_values_however_it_is_made() -> None:
    assert all(issubclass(config_class, Settings) for config_class in CLASSES)
    with pytest.raises(UserError, match=r"OptimConfig\.weight_decay must be at least 0, not -1"):
        dataclasses.replace(OptimConfig(), weight_decay=-1.0)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_range_without_infinities(name: str) -> None:
    field = NUMBERS[name]
    rule = field.metadata["rule"]
    assert rule is not None
    is_list = typing.get_origin(field.type) in (list, tuple) or "tuple" in str(field.type)
    for value in (math.inf, -math.inf, math.nan):
        assert not rule.holds((value, -value) if is_list else value)
    # It is declared and checked by one class, so that a subclass that forgets to is seen here.
    config_class = next(c for c in CLASSES if c.__name__ == name.partition(".")[0])
    made = object.__new__(config_class)
    for other in dataclasses.fields(config_class):
        object.__setattr__(made, other.name, None)
    object.__setattr__(made, field.name, [-7] if is_list else -math.inf)
    with pytest.raises(UserError, match=rf"{name} must be "):
        made.__post_init__()


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.weight_decay=-1", "optim.weight_decay must be at least 0, not -1.0."),
        ("optim.eps=-1", "optim.eps must be above 0, not -1.0."),
        ("optim.start_learning_rate=-1", "optim.start_learning_rate must be at least 0, not -1.0."),
        ("optim.beta2=1", "optim.beta2 must be in [0, 1), not 1.0."),
        ("data.num_workers=-3", "data.num_workers must be at least 0, not -3."),
        ("trainer.sample_prompts=[]", "trainer.sample_prompts must be at least one, not []."),
        ("objective.kl_weight=-1", "objective.kl_weight must be at least 0, not -1.0."),
        ("in_loop_eval.likelihood.rtol=1", "in_loop_eval.likelihood.rtol must be in (0, 1), not 1"),
        ("vae.init_std=0", "vae.init_std must be above 0, not 0.0."),
        ("budget.eflops=-1", "budget.eflops must be above 0 or null, not -1.0."),
        ("seed=-1", "seed must be in [0, 2^63), not -1."),
    ],
)
def test_the_error_names_the_whole_key_and_the_range(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_config(VAERunConfig, None, [*RUN, override])
    assert message in str(refused.value)


def test_options_are_not_chosen_by_the_ode_which_also_scores_what_fills_a_block() -> None:
    ode = "likelihood.method=ode"
    assert load_config(EvaluationConfig, None, [ode]).likelihood.method == "ode"
    with pytest.raises(
        UserError, match=r"choose_by=likelihood compares .*: use likelihood\.method"
    ):
        load_config(EvaluationConfig, None, [ode, "choose_by=likelihood"])


@pytest.mark.parametrize("name", VERBS)
def test_the_help_and_the_page_show_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help", "all"])
    shown = " ".join(capsys.readouterr().out.split())
    page = DOCS.read_text(encoding="utf-8")
    fields: dict[str, Any] = dict(leaves(VERBS[name]))
    for entry in describe(VERBS[name]):
        rule = fields[entry.key].metadata["rule"] if entry.key in fields else None
        if rule is not None:
            assert f"[{entry.default}; {rule.words}" in shown, entry.key
            assert f"| `{entry.key}` |" in page
            assert rule.words in page


def test_a_budget_need_not_be_whole_in_decimals() -> None:
    eflops = 3.3333333333333335e-05
    budget = load_config(VAERunConfig, None, [*RUN, f"budget.eflops={eflops}"]).budget
    assert budget.eflops == eflops
    assert Amount.of_eflops(eflops) == Amount(33_333_333_333_333, "EFLOPs")
    assert (
        Amount.of_eflops(38.9)
        == Amount.parse("38.9 EFLOPs", "budget")
        == Amount(38_900_000_000_000_000_000, "EFLOPs")
    )
    assert Amount.of_eflops(1e-30).count == 1


@pytest.mark.parametrize("text", ["1e999999999 tokens", f"{'9' * 5000} steps", "1e-400 EFLOPs"])
def test_an_amount_is_no_way_to_use_up_the_memory(text: str) -> None:
    with pytest.raises(UserError, match=r"optim\.warmup must be an amount such as"):
        load_config(VAERunConfig, None, [*RUN, f"optim.warmup={text}"])

"""`cola-train match`: models of other families of a run's size or compute, and how fair that is."""

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import yaml

from cola_train.config.amounts import FLOPS_PER_EFLOP, Amount
from cola_train.config.load import leaves, value_at
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError
from cola_train.console import aligned
from cola_train.families.costs import flops_after, steps_to
from cola_train.families.family import Family, MatchTarget
from cola_train.families.registry import families, family_of
from cola_train.training.loop.budget import Budget

Equal = Literal["parameters", "flops", "tokens"]
RULES: dict[Equal, str] = {
    "parameters": (
        "parameters of the backbone: the DiT's, and of others all but token embedding and "
        "vocabulary head"
    ),
    "flops": "FLOPs per token, over the whole run and by its budget.convention",
    "tokens": "tokens alone: the others have the run's width and number of layers",
}
# Sizes this close count as equal; among them the one nearest in width is taken.
_TOLERANCE = 0.01
# Of width / layers to the run's, where sizes allow.
_LARGEST_ASPECT_RATIO = 2.0


class _Size(NamedTuple):
    width: int
    layers: int
    error: float  # relative


def match(config: RunConfig, equal: Equal) -> dict[str, RunConfig]:
    """The configs of other families that are equal to a run, by family.

    They read the same rows in the same order for as many steps, and share seeds, optimization and
    loop. Widths are multiples of the run's head_dim, and width over layers is within a factor of 2
    of the run's. Sizes within 1% of equal count as equal, and of these the width nearest to the
    run's is taken; where none is so close, the size closest to equal.

    Raises:
        UserError: a config of a family that nothing is matched to, or a head_dim that another
            family cannot have.
    """
    target = family_of(config).match_target(config)
    if target is None:
        sources = [
            name
            for name, family in families().items()
            if type(family).match_target is not Family.match_target
        ]
        problem = f"match starts from a run of {' or '.join(sources)}"
        raise UserError(f"{problem}; {config.name} is of {config.stage!r}.")
    # They end at the same step.
    trainer = dataclasses.replace(config.trainer, max_steps=Budget(config).last_step)
    config = dataclasses.replace(config, trainer=trainer)
    found = {name: _solved(config, equal, family, target) for name, family in families().items()}
    return {name: matched for name, matched in found.items() if matched is not None}


def fairness(config: RunConfig, equal: Equal) -> dict[str, Any]:
    """What is equal and what is not between a run and its matches, ready for JSON.

    Raises:
        UserError: as `match`.
    """
    matched = match(config, equal)
    target = family_of(config).match_target(config)
    assert target is not None
    own = _measure(config, equal)
    return {
        "equal": equal,
        "to": config.stage,
        "rule": RULES[equal],
        "convention": config.budget.convention,
        "relative_difference": {
            name: _measure(of, equal) / own - 1 for name, of in matched.items()
        },
        "notes": list(target.notes),
        "overrides": {name: _overrides(of) for name, of in matched.items()},
        "families": {name: _describe(of) for name, of in {config.stage: config, **matched}.items()},
    }


def show(table: Mapping[str, Any], as_json: bool) -> str:
    """`fairness` as JSON, or as a table of properties by family, with "=" where all agree."""
    if as_json:
        return json.dumps(table, indent=1) + "\n"
    lines = [f"Equal in {table['rule']}."]
    for family, share in table["relative_difference"].items():
        lines.append(f"{family}: {share:+.3%} from {table['to']}'s")
    flat = {family: _flatten(values) for family, values in table["families"].items()}
    all_names = dict.fromkeys(name for values in flat.values() for name in values)
    groups = dict.fromkeys(name.partition(":")[0] for name in all_names)
    names = [name for group in groups for name in all_names if name.partition(":")[0] == group]
    rows = [["", *flat, ""]]
    for name in names:
        cells = [_cell(values[name]) if name in values else "-" for values in flat.values()]
        rows.append([name, *cells, "=" if len(set(cells)) == 1 else ""])
    lines += ["", *aligned(rows)]
    lines += ["", *table["notes"], "", "To train them:"]
    for family, values in table["overrides"].items():
        lines.append(f"cola-train {shlex.join([family, *values])}")
    return "\n".join(lines) + "\n"


def _measure(config: RunConfig, equal: Equal) -> float:
    """The quantity that is to be equal."""
    if equal == "parameters":
        return family_of(config).backbone_parameters(config)
    steps = Budget(config).last_step
    tokens = steps * config.trainer.global_batch_size * config.data.seq_len
    if equal == "flops":
        return flops_after(config, steps)[config.budget.convention] / tokens
    return tokens


def _solved(
    config: RunConfig, equal: Equal, family: Family[Any], target: MatchTarget
) -> RunConfig | None:
    def build(width: int, layers: int) -> RunConfig:
        found: RunConfig | None = family.matched(config, target, width, layers)
        assert found is not None
        return found

    nearest_width = max(1, round(target.width / target.head_dim)) * target.head_dim
    if family.name == config.stage or family.matched(config, target, nearest_width, 1) is None:
        return None
    if equal == "tokens":
        return build(nearest_width, target.num_layers)
    wanted = _measure(config, equal)

    def sizes(width: int) -> list[_Size]:
        # Parameters and FLOPs are straight lines over the number of layers.
        one, two = (_measure(build(width, layers), equal) for layers in (1, 2))
        exact = 1 + (wanted - one) / (two - one)
        whole = {max(1, math.floor(exact)), max(1, math.ceil(exact))}
        return [
            _Size(width, layers, abs(one + (layers - 1) * (two - one) - wanted) / wanted)
            for layers in sorted(whole)
        ]

    def is_shaped(size: _Size) -> bool:
        aspect_ratio = size.width / size.layers * target.num_layers / target.width
        return abs(math.log(aspect_ratio)) <= math.log(_LARGEST_ASPECT_RATIO)

    widths = range(target.head_dim, 4 * target.width + target.head_dim, target.head_dim)
    found = [size for width in widths for size in sizes(width)]
    # Heads as wide as a small network leave no choice of shape.
    shaped = [size for size in found if is_shaped(size)] or found
    if close := [size for size in shaped if size.error <= _TOLERANCE]:
        best = min(close, key=lambda size: (abs(math.log(size.width / target.width)), size.error))
    else:
        best = min(shaped, key=lambda size: size.error)
    return build(best.width, best.layers)


def _overrides(config: RunConfig) -> list[str]:
    """The overrides from which the family's verb makes this config, without a file."""
    default, overrides = type(config)(name=config.name), []
    for key, _ in leaves(type(config)):
        value = value_at(config, key)
        if key == "name" or value != value_at(default, key):
            is_plain = isinstance(value, str) and yaml.safe_load(value) == value
            overrides.append(f"{key}={value if is_plain else json.dumps(value)}")
    return overrides


def _describe(config: RunConfig) -> dict[str, Any]:
    family, optim, steps = family_of(config), config.optim, Budget(config).last_step
    tokens = steps * config.trainer.global_batch_size * config.data.seq_len
    total, parts = flops_after(config, steps), family.parameters(config)
    rates = (optim.start_learning_rate, optim.learning_rate, optim.final_learning_rate)
    return {
        "network": family.describe(config),
        "data": {
            "path": config.data.path,
            "order seed": config.data_seed,
            "seq_len": config.data.seq_len,
        },
        "seed": config.seed,
        "tokenizer": f"of the data, {config.vocab_size:,} ids",
        "rows per step": config.trainer.global_batch_size,
        "steps": steps,
        "tokens": tokens,
        "schedule": {
            "kind": optim.schedule,
            "learning rate": " to ".join(f"{rate:g}" for rate in rates),
            **{
                f"{name} steps": steps_to(config, Amount.parse(getattr(optim, name), name))
                for name in ("warmup", "decay", "anneal")
            },
            "weight decay": optim.weight_decay,
            "gradient clip": optim.gradient_clip,
        },
        "parameters": parts,
        "parameters in all": sum(parts.values()),
        "backbone's parameters": family.backbone_parameters(config),
        "FLOPs per token": {name: flops / tokens for name, flops in total.items()},
        "EFLOPs in all": {name: flops / FLOPS_PER_EFLOP for name, flops in total.items()},
    }


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{name}: ")
        else:
            found[prefix + name] = value
    return found


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.6g}" if isinstance(value, float) else str(value)

"""`cola-train match`: baselines that are equal to a stage-2 run in size or in compute, and a table of what else is equal."""

import dataclasses
import json
import math
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import yaml

from cola_train.config.amounts import FLOPS_PER_EFLOP, Amount
from cola_train.config.baselines import AutoregressiveConfig, MaskedDiffusionConfig, TransformerConfig
from cola_train.config.load import leaves, value_at
from cola_train.config.models import DiTConfig
from cola_train.config.runs import AutoregressiveRunConfig, BaselineRunConfig, JointRunConfig, LLaDARunConfig, RunConfig
from cola_train.config.settings import UserError
from cola_train.flops.parameters import backbone_parameters, parameters_by_part
from cola_train.flops.steps import flops_after, steps_to
from cola_train.scaling.table import aligned

Baseline = TypeVar("Baseline", bound=BaselineRunConfig)
Equal = Literal["parameters", "flops", "tokens"]
RULES: dict[Equal, str] = {
    "parameters": "parameters of the backbone: the DiT's, and a baseline's without token embedding and vocabulary head",
    "flops": "FLOPs per token, over the whole run and by its budget.convention",
    "tokens": "tokens alone: the baselines have the DiT's width and number of layers",
}
# Sizes this close count as equal; among them the one nearest in width is taken.
_TOLERANCE = 0.01
# Of a baseline's width over its number of layers, to the DiT's, where sizes allow.
_LARGEST_ASPECT_RATIO = 2.0


@dataclasses.dataclass(frozen=True)
class _Size:
    width: int
    layers: int
    error: float  # relative

    def aspect_off(self, dit: DiTConfig) -> float:
        """By what factor, as a logarithm, width over layers differs from the DiT's."""
        return abs(math.log(self.width / self.layers * dit.num_layers / dit.txt_dim))

    def width_off(self, dit: DiTConfig) -> float:
        """The same of the width."""
        return abs(math.log(self.width / dit.txt_dim))


def match(config: RunConfig, equal: Equal) -> dict[str, AutoregressiveRunConfig | LLaDARunConfig]:
    """The two baselines' configs that are equal to a stage-2 run, by family ("ar", "llada").

    They read the same rows in the same order for as many steps, and share seeds, optimisation and loop. Hidden sizes are multiples
    of the DiT's head_dim, the feed-forward is four times as wide, and width over layers is within a factor of 2 of the DiT's. Sizes
    within 1% of equal count as equal, and of these the width nearest to the DiT's is taken; where none is so close, the closest.

    Raises:
        UserError: a config of another stage, or a head_dim that a baseline cannot have.
    """
    if not isinstance(config, JointRunConfig):
        raise UserError(f"match starts from the config of a stage-2 run; {config.name} is of stage {config.stage!r}.")  # type: ignore[attr-defined]
    return {"ar": _solved(config, equal, _autoregressive), "llada": _solved(config, equal, _llada)}


def fairness(config: RunConfig, equal: Equal) -> dict[str, Any]:
    """What is equal and what is not between a stage-2 run and its matched baselines, ready for JSON.

    Raises:
        UserError: as `match`.
    """
    baselines = match(config, equal)
    assert isinstance(config, JointRunConfig)
    families: dict[str, RunConfig] = {"cola": config, **baselines}
    measured = {family: _measure(of, equal) for family, of in families.items()}
    return {
        "equal": equal,
        "rule": RULES[equal],
        "convention": config.budget.convention,
        "relative_difference": {family: measured[family] / measured["cola"] - 1 for family in baselines},
        "notes": _notes(config),
        "overrides": {family: _overrides(of) for family, of in baselines.items()},
        "families": {family: _describe(of) for family, of in families.items()},
    }


def show(table: Mapping[str, Any], as_json: bool) -> str:
    """`fairness` as one JSON object, or as text: a row for each property, a column for each family, "=" where all agree."""
    if as_json:
        return json.dumps(table, indent=1) + "\n"
    lines = [f"Equal in {table['rule']}."]
    lines += [f"{family}: {share:+.3%} from cola's" for family, share in table["relative_difference"].items()]
    flat = {family: dict(_flatten(values)) for family, values in table["families"].items()}
    all_names = dict.fromkeys(name for values in flat.values() for name in values)
    groups = dict.fromkeys(name.partition(":")[0] for name in all_names)
    names = [name for group in groups for name in all_names if name.partition(":")[0] == group]
    rows = [["", *flat, ""]]
    for name in names:
        cells = [_cell(values[name]) if name in values else "-" for values in flat.values()]
        rows.append([name, *cells, "=" if len(set(cells)) == 1 else ""])
    lines += ["", *aligned(rows)]
    lines += ["", *table["notes"], "", "To train them:"]
    lines += [f"cola-train {shlex.join([family, *values])}" for family, values in table["overrides"].items()]
    return "\n".join(lines) + "\n"


def _autoregressive(config: JointRunConfig, transformer: TransformerConfig) -> AutoregressiveRunConfig:
    objective = AutoregressiveConfig(mask_documents=config.objective.mask_documents)
    return AutoregressiveRunConfig(**_shared(config, "ar"), transformer=transformer, objective=objective)


def _llada(config: JointRunConfig, transformer: TransformerConfig) -> LLaDARunConfig:
    objective = MaskedDiffusionConfig(mask_documents=config.objective.mask_documents)
    return LLaDARunConfig(**_shared(config, "llada"), transformer=transformer, objective=objective)


def _shared(config: JointRunConfig, family: str) -> dict[str, Any]:
    """What a baseline has from the stage-2 run; it ends at the same step, and the paper's convention counts its own parameters."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(RunConfig)}
    return shared | {
        "name": f"{config.name}_{family}",
        "trainer": dataclasses.replace(config.trainer, max_steps=_steps(config)),
        "budget": dataclasses.replace(config.budget, eflops=None, nominal_parameters=None),
        "warm_start_from": None,
        "branched_from": None,
    }


def _steps(config: RunConfig) -> int:
    """Where a run ends."""
    if config.budget.eflops is None:
        return config.trainer.max_steps
    budget = Amount.parse(f"{config.budget.eflops!r} EFLOPs", "budget.eflops")
    return min(config.trainer.max_steps, steps_to(config, budget))


def _tokens(config: RunConfig) -> int:
    return _steps(config) * config.trainer.global_batch_size * config.data.seq_len


def _measure(config: RunConfig, equal: Equal) -> float:
    """What is to be equal."""
    if equal == "parameters":
        return backbone_parameters(config)
    if equal == "flops":
        return flops_after(config, _steps(config))[config.budget.convention] / _tokens(config)
    return _tokens(config)


def _transformer(config: JointRunConfig, width: int, layers: int) -> TransformerConfig:
    head_dim = config.dit.head_dim
    return TransformerConfig(
        vocab_size=config.vae.vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // head_dim,
        head_dim=head_dim,
    )


def _solved(config: JointRunConfig, equal: Equal, build: Callable[[JointRunConfig, TransformerConfig], Baseline]) -> Baseline:
    dit = config.dit
    if equal == "tokens":
        width = max(1, round(dit.txt_dim / dit.head_dim)) * dit.head_dim
        return build(config, _transformer(config, width, dit.num_layers))
    target = _measure(config, equal)

    def sizes(width: int) -> list[_Size]:
        # Parameters and FLOPs are straight lines over the number of layers.
        one, two = (_measure(build(config, _transformer(config, width, layers)), equal) for layers in (1, 2))
        exact = 1 + (target - one) / (two - one)
        whole = {max(1, math.floor(exact)), max(1, math.ceil(exact))}
        return [_Size(width, layers, abs(one + (layers - 1) * (two - one) - target) / target) for layers in sorted(whole)]

    widths = range(dit.head_dim, 4 * dit.txt_dim + dit.head_dim, dit.head_dim)
    found = [size for width in widths for size in sizes(width)]
    # Heads as wide as a small network leave no choice of shape.
    shaped = [size for size in found if size.aspect_off(dit) <= math.log(_LARGEST_ASPECT_RATIO)] or found
    close = [size for size in shaped if size.error <= _TOLERANCE]
    best = min(close, key=lambda size: (size.width_off(dit), size.error)) if close else min(shaped, key=lambda size: size.error)
    return build(config, _transformer(config, best.width, best.layers))


def _overrides(config: RunConfig) -> list[str]:
    """What the family's verb makes this config from, without a file."""
    default = type(config)(name=config.name)
    keys = [key for key, _ in leaves(type(config)) if key == "name" or value_at(config, key) != value_at(default, key)]
    return [f"{key}={_as_yaml(value_at(config, key))}" for key in keys]


def _as_yaml(value: Any) -> str:
    plain = isinstance(value, str) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value)


def _notes(config: JointRunConfig) -> list[str]:
    notes = []
    if config.init_vae_from is not None:
        notes.append(
            f"Stage 1, which trained the VAE that {config.name} starts from, comes on top: no tokens or FLOPs of it are here."
        )
    if config.budget.nominal_parameters is not None:
        notes.append(f"The paper's convention takes N = {config.budget.nominal_parameters:,} for {config.name}, by its "
                     "budget.nominal_parameters, and the counted backbone for the baselines.")  # fmt: skip
    return notes


def _describe(config: RunConfig) -> dict[str, Any]:
    optim, trainer, steps, tokens = config.optim, config.trainer, _steps(config), _tokens(config)
    total = flops_after(config, steps)
    parts = parameters_by_part(config)
    return {
        "network": _network(config),
        "data": {"path": config.data.path, "order seed": config.data_seed, "seq_len": config.data.seq_len},
        "seed": config.seed,
        "tokenizer": f"of the data, {config.vocab_size:,} ids",
        "rows per step": trainer.global_batch_size,
        "steps": steps,
        "tokens": tokens,
        "schedule": {
            "kind": optim.schedule,
            "learning rate": f"{optim.start_learning_rate:g} to {optim.learning_rate:g} to {optim.final_learning_rate:g}",
            **{
                f"{name} steps": steps_to(config, Amount.parse(getattr(optim, name), name))
                for name in ("warmup", "decay", "anneal")
            },
            "weight decay": optim.weight_decay,
            "gradient clip": optim.gradient_clip,
        },
        "parameters": parts,
        "parameters in all": sum(parts.values()),
        "backbone's parameters": backbone_parameters(config),
        "FLOPs per token": {convention: flops / tokens for convention, flops in total.items()},
        "EFLOPs in all": {convention: flops / FLOPS_PER_EFLOP for convention, flops in total.items()},
    }


def _network(config: RunConfig) -> str:
    if isinstance(config, JointRunConfig):
        vae, dit = config.vae, config.dit
        return f"DiT {dit.num_layers} x {dit.txt_dim}, VAE {vae.encoder_num_blocks} + {vae.decoder_num_blocks} x {vae.dim}"
    assert isinstance(config, BaselineRunConfig)
    return f"{config.transformer.num_hidden_layers} x {config.transformer.hidden_size}"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flatten(value, f"{prefix}{name}: ") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _cell(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}" if isinstance(value, float) else str(value)

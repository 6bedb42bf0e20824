"""What figures of written text depend on besides the model; they compare only where it agrees."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from cola_train.config.sampling import SamplerConfig
from cola_train.config.settings import require
from cola_train.evaluation.writing.config import ComparisonConfig

CONDITIONS = "comparison_conditions"  # in a line of metrics.jsonl
_TOKEN_CHOICE = ("temperature", "top_k", "top_p", "repetition_penalty")


def conditions_of(
    config: ComparisonConfig, row_tokens: int, solver_settings: Collection[str]
) -> dict[str, Any]:
    """The conditions that are known before anything is written, as JSON.

    `row_tokens` is the length of the rows that the model was trained on, `solver_settings` those of
    SamplerConfig that choose the solver of its family.
    """

    def chosen(sampler: SamplerConfig) -> dict[str, Any]:
        names = [*_TOKEN_CHOICE, *sorted(solver_settings)]
        values = {name: getattr(sampler, name) for name in names}
        return {
            name: [*value] if isinstance(value, tuple) else value for name, value in values.items()
        }

    samplers = {"greedy": chosen(config.greedy), "sampler": chosen(config.sampler)}
    counts = ("num_openings", "num_new_tokens", "num_bytes", "brier_places", "judge_order")
    values = dataclasses.asdict(config)
    return {
        "row_tokens": row_tokens,
        **{name: values[name] for name in counts},
        **{
            f"{name}.{key}": value for name, some in samplers.items() for key, value in some.items()
        },
    }


def refuse_apart(conditions: Iterable[tuple[str, Mapping[str, Any] | None]], remedy: str) -> None:
    """Refuse figures that were made under different conditions, which follow each model's name.

    What plays no part for a family is not among its conditions. None is of figures whose conditions
    are not known, which stand beside their like alone. `remedy` ends the message.

    Raises:
        UserError: two differ; each condition is named, with both values.
    """
    first: dict[str, tuple[str, Any]] = {}
    for name, found in conditions:
        known = {"known": found is not None, **(found or {})}
        holders = {key: first.setdefault(key, (name, value)) for key, value in known.items()}
        different = [
            f"{key} ({known[key]} for {name}, {value} for {holder})"
            for key, (holder, value) in holders.items()
            if value != known[key]
        ]
        require(
            not different,
            "Figures of `cola-train compare` stand side by side only if they were made in the same "
            f"way, and here differ: {'; '.join(different)}. {remedy}",
        )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """The conditions that play a part for both and differ, each with both values."""
    return [
        f"{key} ({ours[key]}, not {theirs[key]})"
        for key in ours
        if key in theirs and ours[key] != theirs[key]
    ]

"""`cola-train plan`: what a run is and costs, before anything is launched."""

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from cola_train.config.amounts import FLOPS_PER_EFLOP, Amount, Mark
from cola_train.config.run import RunConfig
from cola_train.config.settings import UserError, require
from cola_train.console import aligned
from cola_train.data.packing import TRAIN
from cola_train.data.prepared import PreparedData
from cola_train.families.costs import (
    CONVENTIONS,
    flops_after,
    network_parameters,
    step_flops,
    step_parts,
    steps_to,
)
from cola_train.families.registry import family_of
from cola_train.peaks import device_named
from cola_train.scaling.memory import check_rows, estimate, what_fits
from cola_train.training.loop.budget import Budget
from cola_train.training.optim.schedule import Schedule

_LISTED_MARKS = 30


@dataclasses.dataclass(frozen=True)
class Fleet:
    """The devices that a run is planned for."""

    device: str  # a name of peaks.py
    count: int
    per_node: int
    mfu: float  # the share of the peak that useful FLOPs (convention `model`) reach
    price: float | None  # of a device-hour, in whatever currency

    def __post_init__(self) -> None:
        device_named(self.device)
        require(
            self.count >= 1 and self.per_node >= 1,
            f"--devices and --per-node must be at least 1, not {self.count}, {self.per_node}.",
        )
        require(0 < self.mfu <= 1, f"--mfu must be in (0, 1], not {self.mfu}.")
        require(
            self.price is None or self.price >= 0, f"--price must be 0 or more, not {self.price}."
        )


def make_plan(config: RunConfig, fleet: Fleet, extra: Sequence[str]) -> dict[str, Any]:
    """Everything that `plan` says, ready for JSON.

    `extra` are amounts ("10000", "2e9 tokens", "100 EFLOPs") to give the cost at, beside the run's
    end and its marks.

    Raises:
        UserError: devices that the batch does not divide among, or an amount that cannot be read.
    """
    family, budget, rows = family_of(config), Budget(config), None
    with contextlib.suppress(UserError):  # the data is not prepared yet
        rows = PreparedData.open(config.data.path).num_rows(TRAIN)
    end = budget.last_step
    amounts = (steps_to(config, Amount.parse(text, "--at")) for text in extra)
    moments = {*_mark_steps(config, budget.marks, end), *amounts, end}
    parts = {name: dataclasses.asdict(work) for name, work in step_parts(config).items()}
    per_node = min(fleet.count, fleet.per_node)
    most_bytes = device_named(fleet.device).memory_bytes
    check_rows(config, fleet.count)
    Schedule.of(config)
    # First, because it records every kind of checkpointing at once, the config's own among them.
    options = what_fits(config, fleet.count, most_bytes, per_node)
    memory = estimate(config, fleet.count, per_node, "cuda")
    return {
        "run": config.name,
        "stage": config.stage,
        "parameters": {
            **family.parameters(config),
            **network_parameters(config),
            "backbone": family.backbone_parameters(config),
        },
        "tokens_per_step": config.trainer.global_batch_size * config.data.seq_len,
        "step_flops": step_flops(config, 0),
        "step_flops_by_part": parts,
        "conventions": CONVENTIONS,
        "budget": {
            "eflops": config.budget.eflops,
            "convention": config.budget.convention,
            "steps": end,
        },
        "moments": [_moment(config, steps, rows, fleet) for steps in sorted(moments) if steps > 0],
        "devices": {**dataclasses.asdict(fleet), "memory_bytes": most_bytes},
        "memory": {
            "parts": memory.by_part,
            "peak": memory.peak,
            "fits": memory.peak <= most_bytes,
        },
        "what_fits": [dataclasses.asdict(option) for option in options],
    }


def _mark_steps(config: RunConfig, marks: Sequence[Mark], end: int) -> set[int]:
    """The first marks up to a run's end."""
    steps = set()
    for mark in marks:
        for number in range(1, _LISTED_MARKS + 1 if mark.repeats else 2):
            amount = dataclasses.replace(mark.amount, count=number * mark.amount.count)
            steps.add(steps_to(config, amount))
    return {step for step in steps if step <= end}


def _moment(config: RunConfig, steps: int, rows: int | None, fleet: Fleet) -> dict[str, Any]:
    trainer, flops = config.trainer, flops_after(config, steps)
    peak = device_named(fleet.device).peak(trainer.precision)
    seconds = flops["model"] / (fleet.mfu * peak * fleet.count)
    device_hours = seconds * fleet.count / 3600
    return {
        "steps": steps,
        "tokens": steps * trainer.global_batch_size * config.data.seq_len,
        "epochs": None if rows is None else steps * trainer.global_batch_size / rows,
        "eflops": {convention: count / FLOPS_PER_EFLOP for convention, count in flops.items()},
        "days": seconds / 86400,
        "device_hours": device_hours,
        "cost": None if fleet.price is None else device_hours * fleet.price,
    }


def show(plan: dict[str, Any], as_json: bool) -> str:
    """A plan as one JSON object, or as text to read."""
    if as_json:
        return json.dumps(plan, indent=1) + "\n"
    fleet, budget = plan["devices"], plan["budget"]
    lines = [f"{plan['run']} ({plan['stage']})", "", "Parameters"]
    lines += [f"  {name:34}{count:>22,}" for name, count in plan["parameters"].items()]
    lines += ["", f"A step of {plan['tokens_per_step']:,} tokens, FLOPs by convention"]
    lines += [f"  {name:10}{flops:>28,}  {flops:.4e}" for name, flops in plan["step_flops"].items()]
    lines += [f"  {name}: {words}" for name, words in plan["conventions"].items()]
    lines += ["", "FLOPs of a step by part", *_table(_part_rows(plan))]
    if budget["eflops"] is not None:
        end = f"reached at step {budget['steps']:,}"
        lines += ["", f"Budget: {budget['eflops']:,} EFLOPs ({budget['convention']}), {end}"]
    devices = f"at {fleet['mfu']:.0%} MFU on {fleet['count']} x {fleet['device']}"
    lines += ["", f"In the course of training, {devices}", *_table(_moment_rows(plan))]
    peak, most = plan["memory"]["peak"], fleet["memory_bytes"]
    device = f"Memory of a device ({_size(most)})"
    lines += ["", f"{device}, with the micro-batch and sharding of the config"]
    lines += [f"  {name:34}{_size(size):>12}" for name, size in plan["memory"]["parts"].items()]
    lines += [f"  {'peak':34}{_size(peak):>12}  {'fits' if peak <= most else 'does not fit'}"]
    lines += ["", "What fits: the largest micro-batch by sharding and activation checkpointing"]
    lines += _table(_fit_rows(plan))
    return "\n".join(lines) + "\n"


def _part_rows(plan: dict[str, Any]) -> list[list[str]]:
    parts = plan["step_flops_by_part"]
    names = list(next(iter(parts.values())))
    rows = [["part", *(name.replace("_", " ") for name in names)]]
    rows += [[part, *(f"{work[name]:,}" for name in names)] for part, work in parts.items()]
    return rows


def _moment_rows(plan: dict[str, Any]) -> list[list[str]]:
    conventions = list(plan["step_flops"])
    spent_titles = [f"EFLOPs {name}" for name in conventions]
    rows = [["steps", "tokens", "epochs", *spent_titles, "days", "device-hours", "cost"]]
    for moment in plan["moments"]:
        epochs = "-" if moment["epochs"] is None else f"{moment['epochs']:,.2f}"
        cost = "-" if moment["cost"] is None else f"{moment['cost']:,.0f}"
        spent = [
            f"{value:,.2f}" if value >= 0.1 else f"{value:.4g}"
            for value in moment["eflops"].values()
        ]
        time = [f"{moment['days']:,.2f}", f"{moment['device_hours']:,.1f}"]
        rows.append([f"{moment['steps']:,}", f"{moment['tokens']:,}", epochs, *spent, *time, cost])
    return rows


def _fit_rows(plan: dict[str, Any]) -> list[list[str]]:
    rows = [["sharding", "checkpointing", "largest micro-batch", "peak"]]
    for option in plan["what_fits"]:
        largest = f"{option['micro_batch_size']:,}" if option["micro_batch_size"] else "none fits"
        spread = [option["strategy"], option["activation_checkpointing"]]
        rows.append([*spread, largest, _size(option["peak"])])
    return rows


def _size(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in aligned(rows, numbers=True)]

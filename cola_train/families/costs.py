"""What training steps cost, by three conventions, from the run's config alone."""

import bisect
import itertools
from collections import Counter

from cola_train.config.amounts import Amount
from cola_train.config.loop import Convention
from cola_train.config.run import RunConfig
from cola_train.families.registry import family_of
from cola_train.flops.work import Parts, Work

CONVENTIONS: dict[Convention, str] = {
    "paper": (
        "6 x N x D: N is budget.nominal_parameters, or else the parameters of the backbone (the "
        "DiT; a baseline, or stage 1's VAE, without token embedding and vocabulary head); D is "
        "the tokens of the step, padding included."
    ),
    "model": (
        "What this architecture needs: matrix products, the patch convolution and attention over "
        "visible pairs, forward and backward, 2 per multiply-add. Nothing that is computed twice, "
        "nothing of the clean half's last hidden states in the DiT, which nobody reads; adaLN "
        "once per distinct time of the step. What depends on the data (padding, documents that "
        "are kept apart, hidden histories) is not subtracted."
    ),
    "executed": (
        "What kernels compute, as torch's FlopCounterMode counts it: attention over whole tiles of "
        "pairs (models/attention/tiles.py; a kernel without a mask takes whole rows, and leaves "
        "out nearly half of a causal one), every position that runs, adaLN once per distinct time "
        "of a micro-batch, what activation checkpointing computes again, and the scores that the "
        "fused attention backward computes again."
    ),
}


def phase_of(config: RunConfig, step: int) -> str:
    """The name of the phase that optimizer step `step`, counted from 0, is in."""
    phases = family_of(config).phases(config)
    ends = list(itertools.accumulate(phase.num_steps for phase in phases))
    return phases[bisect.bisect(ends, step % ends[-1])].name


def step_parts(config: RunConfig, step: int = 0) -> Parts:
    """The work of optimizer step `step` over all its rows, by part of the networks.

    `linear` are the projections and the patch convolution, `attention` its products, `head` the
    vocabulary head, `adaln` the time embedding and what modulates by it.
    """
    return family_of(config).step_work(config, phase_of(config, step))


def step_flops(config: RunConfig, step: int) -> dict[Convention, int]:
    """FLOPs of optimizer step `step`, counted from 0, over all processes, by convention."""
    return phase_flops(config, phase_of(config, step))


def phase_flops(config: RunConfig, phase: str) -> dict[Convention, int]:
    """FLOPs of a step in a phase, by convention."""
    family = family_of(config)
    total = sum(family.step_work(config, phase).values(), Work())
    parameters = config.budget.nominal_parameters or family.backbone_parameters(config)
    paper = 6 * parameters * _tokens(config)
    return {"paper": paper, "model": total.model, "executed": total.executed}


def flops_after(config: RunConfig, steps: int) -> dict[Convention, int]:
    """FLOPs of a run's first `steps` steps, by convention."""
    cycle = _cycle(config)
    whole, rest = divmod(steps, sum(number for number, _ in cycle))
    total = dict.fromkeys(CONVENTIONS, 0)
    for number, flops in cycle:
        done = min(rest, number)
        rest -= done
        for convention in total:
            total[convention] += (whole * number + done) * flops[convention]
    return total


def steps_to(config: RunConfig, amount: Amount) -> int:
    """The fewest steps that reach `amount`; EFLOPs are counted by budget.convention."""
    if amount.unit != "EFLOPs":
        return amount.in_steps(_tokens(config))
    phases = [(number, flops[config.budget.convention]) for number, flops in _cycle(config)]
    whole, rest = divmod(amount.count, sum(number * flops for number, flops in phases))
    steps = whole * sum(number for number, _ in phases)
    for number, flops in phases:
        needed = min(number, -(-rest // flops))
        steps, rest = steps + needed, max(0, rest - needed * flops)
    return steps


def network_parameters(config: RunConfig) -> dict[str, int]:
    """A run's parameters by network, such as "vae" and "dit"."""
    networks: Counter[str] = Counter()
    for part, count in family_of(config).parameters(config).items():
        networks[part.split(".")[0]] += count
    return dict(networks)


def _cycle(config: RunConfig) -> list[tuple[int, dict[Convention, int]]]:
    """The phases that steps go through again and again: number of steps, and FLOPs of each."""
    phases = family_of(config).phases(config)
    return [(phase.num_steps, phase_flops(config, phase.name)) for phase in phases]


def _tokens(config: RunConfig) -> int:
    return config.trainer.global_batch_size * config.data.seq_len

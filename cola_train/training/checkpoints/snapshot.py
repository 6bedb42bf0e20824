"""A plain copy of a run's networks as they are now: what is sampled and evaluated while training
goes on.

A sharded network must not be called outside its root, and what is scored is what ships.
"""

import contextlib

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.family import TrainedRun
from cola_train.families.registry import family_of
from cola_train.training.checkpoints.export import training_facts
from cola_train.training.loop.module import StageModule


def gathered_weights(module: StageModule) -> dict[str, Tensor]:
    """The objective's full tensors (with `ema.evaluate` their average) on process 0's CPU, by name;
    a collective call.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with (
        module.ema.in_place_of_the_weights()
        if module.config.ema.evaluate
        else contextlib.nullcontext()
    ):
        state = get_model_state_dict(module.objective, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def plain_copy(module: StageModule, weights: dict[str, Tensor], tokenizer: Tokenizer) -> Checkpoint:
    """The checkpoint of gathered weights, as an export of this step would hold it."""
    config = module.config
    run = TrainedRun(config, weights, tokenizer, training_facts(config, module.state.step))
    return family_of(config).checkpoint(run, module.processes.device)


def reference_copy(
    module: StageModule, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> Checkpoint | None:
    """What the run's drift is measured from, as it began; None where the run keeps nothing of
    it.
    """
    config = module.config
    run = TrainedRun(config, weights, tokenizer, training_facts(config, 0))
    return family_of(config).reference(run, module.processes.device)

"""A plain copy of a run's networks as they are now, which is sampled and evaluated meanwhile.

A sharded network must not be called outside its root, and what is scored is what ships.
"""

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cola_train.data.tokenizer import Tokenizer
from cola_train.families.checkpoint import Checkpoint
from cola_train.families.family import TrainedRun
from cola_train.families.registry import family_of
from cola_train.training.checkpoints.export import training_facts
from cola_train.training.loop.module import StageModule


def gathered_weights(stage: StageModule) -> dict[str, Tensor]:
    """The objective's whole tensors by name, on process 0's CPU; a collective call.

    With `ema.evaluate` the average of those that have one.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with stage.weights_to_evaluate():
        state = get_model_state_dict(stage.objective, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def plain_copy(stage: StageModule, weights: dict[str, Tensor], tokenizer: Tokenizer) -> Checkpoint:
    """The checkpoint of gathered weights, as an export of this step would hold it."""
    config = stage.config
    run = TrainedRun(config, weights, tokenizer, training_facts(config, stage.state.step))
    return family_of(config).checkpoint(run, stage.processes.device)


def reference_copy(
    stage: StageModule, weights: dict[str, Tensor], tokenizer: Tokenizer
) -> Checkpoint | None:
    """What the run's drift is measured from, as it began; None where the run keeps none of it."""
    config = stage.config
    run = TrainedRun(config, weights, tokenizer, training_facts(config, 0))
    return family_of(config).reference(run, stage.processes.device)

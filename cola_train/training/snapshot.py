"""A plain copy of a run's networks as they are now: what is sampled and evaluated while training goes on.

A sharded network must not be called outside its root, and what is scored is what ships.
"""

import contextlib
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cola_train.baseline_format import BaselineCheckpoint
from cola_train.config.runs import AutoregressiveRunConfig, BaselineRunConfig, ColaRunConfig, JointRunConfig, RunConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import Checkpoint
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from cola_train.training.export import training_facts, vae_weights
from cola_train.training.module import StageModule

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def gathered_weights(module: StageModule) -> dict[str, Tensor]:
    """The objective's full tensors (with `ema.evaluate` their average) on process 0's CPU, by name; a collective call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with module.average.in_place_of_the_weights() if module.config.ema.evaluate else contextlib.nullcontext():
        state = get_model_state_dict(module.objective, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def plain_copy(
    config: RunConfig, weights: Mapping[str, Tensor], step: int, tokenizer: Tokenizer, device: torch.device
) -> Checkpoint | BaselineCheckpoint:
    """Networks of gathered weights, as an export of that step would hold them."""
    facts = training_facts(config, step)
    if isinstance(config, BaselineRunConfig):
        transformer = Transformer(config.transformer, causal=isinstance(config, AutoregressiveRunConfig))
        transformer.load_state_dict(_below(weights, "transformer."))
        return BaselineCheckpoint(_ready(transformer, device), tokenizer, facts)
    assert isinstance(config, ColaRunConfig)
    dit = None
    if isinstance(config, JointRunConfig):
        dit = BlockCausalDiT(config.dit)
        dit.load_state_dict(_below(weights, "dit."))
        dit = _ready(dit, device)
    return Checkpoint(_vae(config, _below(weights, "vae."), device), dit, tokenizer, facts)


def reference_copy(
    config: RunConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer, device: torch.device
) -> Checkpoint | None:
    """The VAE with the encoder that stage 2 started from; None where the run keeps none."""
    encoder = {f"encoder.{name}": value for name, value in _below(weights, "reference_encoder.").items()}
    if not encoder:
        return None
    assert isinstance(config, ColaRunConfig)
    return Checkpoint(_vae(config, {**_below(weights, "vae."), **encoder}, device), None, tokenizer, training_facts(config, 0))


def _vae(config: ColaRunConfig, weights: Mapping[str, Tensor], device: torch.device) -> TextVAE:
    vae = TextVAE(config.vae)
    vae.load_state_dict(dict(vae_weights(config, weights)))
    return _ready(vae, device)


def _ready(network: NetworkT, device: torch.device) -> NetworkT:
    return network.to(device).eval().requires_grad_(False)


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}

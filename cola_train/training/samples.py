"""Sample texts while stage 2 or a baseline trains: what the model would say now, in samples.jsonl of the run folder."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cola_train.baseline_format import BaselineCheckpoint
from cola_train.config.runs import AutoregressiveRunConfig, BaselineRunConfig, JointRunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import Lines
from cola_train.hf_format import Checkpoint
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.models.transformer import Transformer
from cola_train.sampling.generate import generate
from cola_train.training.export import training_facts, vae_weights
from cola_train.training.module import StageModule

SamplingRunConfig = JointRunConfig | BaselineRunConfig


class Samples(pl.Callback):
    """Generates from `trainer.sample_prompts` every `trainer.sample_every_steps`, always with the same noise."""

    def __init__(self, config: SamplingRunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
        self.config, self.lines, self.tokenizer = config, Lines(run_folder / "samples.jsonl"), tokenizer

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample on process 0 from a plain copy: a sharded network must not be called outside its root."""
        assert isinstance(pl_module, StageModule)
        every, step = self.config.trainer.sample_every_steps, pl_module.state.step
        if not every or step % every or pl_module.stop_requested:
            return
        pl_module.watchdog.beat(f"writing sample texts after step {step}")
        weights = gathered_weights(pl_module)
        if not pl_module.processes.is_first:
            return
        checkpoint = plain_copy(self.config, weights, step, self.tokenizer, pl_module.processes.device)
        prompts = self.config.trainer.sample_prompts
        results = generate(checkpoint, prompts, SamplerConfig(max_new_tokens=max(1, self.config.data.seq_len // 2)))
        for prompt, result in zip(prompts, results, strict=True):
            self.lines.append({"step": step, "prompt": prompt, "text": result.text})


def gathered_weights(module: StageModule) -> dict[str, Tensor]:
    """The objective's full tensors (with `ema.evaluate` their average) on process 0's CPU, by name; a collective call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with module.average.in_place_of_the_weights() if module.config.ema.evaluate else contextlib.nullcontext():
        state = get_model_state_dict(module.objective, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def plain_copy(
    config: SamplingRunConfig, weights: dict[str, Tensor], step: int, tokenizer: Tokenizer, device: torch.device
) -> Checkpoint | BaselineCheckpoint:
    """Networks to sample from, of gathered weights."""
    facts = training_facts(config, step)
    if isinstance(config, JointRunConfig):
        vae, dit = TextVAE(config.vae), BlockCausalDiT(config.dit)
        vae.load_state_dict(dict(vae_weights(config, _below(weights, "vae."))))
        dit.load_state_dict(_below(weights, "dit."))
        for network in (vae, dit):
            network.to(device).eval().requires_grad_(False)
        return Checkpoint(vae, dit, tokenizer, facts)
    transformer = Transformer(config.transformer, causal=isinstance(config, AutoregressiveRunConfig))
    transformer.load_state_dict(_below(weights, "transformer."))
    return BaselineCheckpoint(transformer.to(device).eval().requires_grad_(False), tokenizer, facts)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}

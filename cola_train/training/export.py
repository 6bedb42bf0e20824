"""From a run to the released layout: at the end of training, or from a saved checkpoint."""

from collections.abc import Mapping
from pathlib import Path

import lightning.pytorch as pl
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from cola_train.config.runs import JointRunConfig, RunConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import DEFAULT_MAX_SHARD_BYTES, Checkpoint, write_checkpoint
from cola_train.models.dit import BlockCausalDiT
from cola_train.models.text_vae import TextVAE
from cola_train.training.checkpoint import read_weights
from cola_train.training.module import StageModule


def full_weights(module: StageModule) -> dict[str, Tensor]:
    """The objective's full tensors on process 0's CPU, by name; a collective call, empty on the others."""
    state = get_model_state_dict(module.objective, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def checkpoint_of(config: RunConfig, weights: Mapping[str, Tensor], step: int, tokenizer: Tokenizer) -> Checkpoint:
    """Plain networks from an objective's full tensors."""
    vae = TextVAE(config.vae)
    vae.load_state_dict(_state_of_fixed_log_snr(config, _below(weights, "vae.")))
    dit = None
    if isinstance(config, JointRunConfig):
        dit = BlockCausalDiT(config.dit)
        dit.load_state_dict(_below(weights, "dit."))
    for network in (vae, dit):
        if network is not None:
            network.eval().requires_grad_(False)
    return Checkpoint(vae, dit, tokenizer, training_facts(config, step))


def training_facts(config: RunConfig, step: int) -> dict[str, int | str]:
    """What an export says of its run beside the released files."""
    stage = "joint" if isinstance(config, JointRunConfig) else "vae"
    return {"stage": stage, "step": step, "seq_len": config.data.seq_len, "run": config.name}


def export_step(
    config: RunConfig,
    checkpoint_folder: Path,
    step: int,
    tokenizer: Tokenizer,
    target: Path,
    *,
    replace: bool,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a saved checkpoint of a run in the released layout."""
    networks: dict[str, TextVAE | BlockCausalDiT] = {"vae": TextVAE(config.vae)}
    if isinstance(config, JointRunConfig):
        networks["dit"] = BlockCausalDiT(config.dit)
    wanted = {f"objective.{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}
    read_weights(checkpoint_folder, wanted)
    weights = {name.removeprefix("objective."): tensor for name, tensor in wanted.items()}
    checkpoint_of(config, weights, step, tokenizer).save(target, replace=replace, max_shard_bytes=max_shard_bytes)


class ExportAtEnd(pl.Callback):
    """Leaves the trained networks in RUN/hf."""

    def __init__(self, config: RunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
        self.config, self.run_folder, self.tokenizer = config, run_folder, tokenizer

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather on every process, write on one."""
        assert isinstance(pl_module, StageModule)
        weights = full_weights(pl_module)
        if trainer.is_global_zero:
            vae = (self.config.vae, _state_of_fixed_log_snr(self.config, _below(weights, "vae.")))
            dit = (self.config.dit, _below(weights, "dit.")) if isinstance(self.config, JointRunConfig) else None
            facts = training_facts(self.config, trainer.global_step)
            write_checkpoint(self.run_folder / "hf", vae, dit, self.tokenizer, facts, replace=True)


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _state_of_fixed_log_snr(config: RunConfig, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a fixed logSNR the log-variance half of the encoder's final layer was never used: make it say the constant."""
    fixed = config.objective.fixed_log_snr  # type: ignore[attr-defined]  # both stages' objectives have it
    if fixed is None:
        return state
    channels = config.vae.latent_dim
    weight, bias = state["encoder.final_layer.weight"].clone(), state["encoder.final_layer.bias"].clone()
    weight[channels:], bias[channels:] = 0.0, -fixed
    return {**state, "encoder.final_layer.weight": weight, "encoder.final_layer.bias": bias}

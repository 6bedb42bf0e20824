"""From a run's checkpoint to the layout it ships in, tensor by tensor: on one process, whatever number saved it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from cola_train.baseline_format import write_baseline
from cola_train.config.runs import AutoregressiveRunConfig, BaselineRunConfig, ColaRunConfig, JointRunConfig, RunConfig
from cola_train.config.settings import require
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import write_checkpoint
from cola_train.tensor_files import DEFAULT_MAX_SHARD_BYTES
from cola_train.training.checkpoint import Manifest, read_manifest, saved_steps, step_folder
from cola_train.training.checkpoint_io import CheckpointReader
from cola_train.training.run_folder import MARKS, stage_name
from cola_train.training.state import AVERAGE, MODEL


class SavedWeights(Mapping[str, Tensor]):
    """A network's weights in a checkpoint, each read when it is asked for."""

    def __init__(self, folder: Path, manifest: Manifest, network: str, use_average: bool) -> None:
        """`network`: "vae", "dit" or "transformer".

        With `use_average` the moving average of those that have one (frozen weights have none).
        """
        self._shapes, self._reader = manifest.shapes, CheckpointReader(folder, manifest, one_process=True)
        self._saved_as = {}
        for saved in manifest.shapes:
            kind, _, name = saved.partition(".")
            if kind == MODEL and name.startswith(f"{network}."):
                average = f"{AVERAGE}.{name}"
                self._saved_as[name.removeprefix(f"{network}.")] = average if use_average and average in manifest.shapes else saved

    def __getitem__(self, name: str) -> Tensor:
        saved = self._saved_as[name]
        tensors = {saved: torch.empty(self._shapes[saved])}
        self._reader.load(tensors)
        return tensors[saved]

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved_as)

    def __len__(self) -> int:
        return len(self._saved_as)


class FixedLogSNR(Mapping[str, Tensor]):
    """A VAE's weights where the logSNR was fixed: the log-variance half of the encoder's final layer, not used, says so."""

    def __init__(self, weights: Mapping[str, Tensor], log_snr: float, channels: int) -> None:
        self._weights, self._log_snr, self._channels = weights, log_snr, channels

    def __getitem__(self, name: str) -> Tensor:
        value = self._weights[name]
        if name.startswith("encoder.final_layer."):
            value = value.clone()
            value[self._channels :] = 0.0 if name.endswith(".weight") else -self._log_snr
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def vae_weights(config: ColaRunConfig, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A run's VAE as it is exported."""
    fixed = config.objective.fixed_log_snr  # type: ignore[attr-defined]  # both stages' objectives have it
    return weights if fixed is None else FixedLogSNR(weights, fixed, config.vae.latent_dim)


def training_facts(config: RunConfig, step: int) -> dict[str, int | str | bool]:
    """What an export says of its run beside the network's own files."""
    apart = bool(config.objective.mask_documents)  # type: ignore[attr-defined]  # all stages have one
    seq_len = config.data.seq_len
    return {"stage": stage_name(config), "step": step, "seq_len": seq_len, "run": config.name, "mask_documents": apart}


def export_checkpoint(
    config: RunConfig,
    folder: Path,
    tokenizer: Tokenizer,
    target: Path,
    *,
    use_average: bool,
    replace: bool,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
) -> None:
    """Write a run's checkpoint `folder` in the released layout, a baseline's in Hugging Face's; memory holds one file at a time.

    Raises:
        UserError: a damaged checkpoint, no average where one is asked for, or a `target` that exists and is not to be replaced.
    """
    manifest = read_manifest(folder)
    require(not use_average or any(name.startswith(f"{AVERAGE}.") for name in manifest.shapes),
            f"{folder} has no moving average of the weights; only a run with ema.decay above 0 has one.")  # fmt: skip

    def saved(network: str) -> SavedWeights:
        return SavedWeights(folder, manifest, network, use_average)

    facts = training_facts(config, manifest.step)
    if isinstance(config, BaselineRunConfig):
        causal = isinstance(config, AutoregressiveRunConfig)
        write_baseline(
            target, config.transformer, saved("transformer"), causal, tokenizer, facts,
            replace=replace, max_shard_bytes=max_shard_bytes,
        )  # fmt: skip
        return
    assert isinstance(config, ColaRunConfig)
    vae = (config.vae, vae_weights(config, saved("vae")))
    dit = (config.dit, saved("dit")) if isinstance(config, JointRunConfig) else None
    write_checkpoint(target, vae, dit, tokenizer, facts, replace=replace, max_shard_bytes=max_shard_bytes)


def export_marks(config: RunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
    """Write each checkpoint that is a mark (budget.marks) to RUN/marks/step-N, where that is not done yet."""
    for step in saved_steps(run_folder):
        folder = step_folder(run_folder, step)
        target = run_folder / MARKS / folder.name
        if not target.exists() and read_manifest(folder).mark:
            export_checkpoint(config, folder, tokenizer, target, use_average=config.ema.export, replace=False)

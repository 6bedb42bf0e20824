"""From a config to a finished run: data, stage, Trainer; start or resume. A run's folder is its own, never overwritten."""

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from cola_train.config.load import load_config, to_yaml
from cola_train.config.runs import JointRunConfig, RunConfig, VAERunConfig
from cola_train.config.settings import UserError, require
from cola_train.data.datamodule import PreparedDataModule
from cola_train.data.tokenizer import Tokenizer
from cola_train.files import write_atomically
from cola_train.hf_format import check_dit_fits, check_vae_fits, find_root
from cola_train.training.checkpoint import Checkpoints, latest_checkpoint, saved_steps, step_folder, step_of
from cola_train.training.export import ExportAtEnd, export_step
from cola_train.training.metrics import Metrics, Progress, wandb_logger
from cola_train.training.module import JointStage, StageModule, TextVAEStage
from cola_train.training.samples import Samples
from cola_train.training.strategy import ShardedStrategy

_CONFIG = "config.yaml"
RunT = TypeVar("RunT", bound=RunConfig)


def start(config: RunConfig) -> Path:
    """Train a new run from its first step; returns its folder.

    Raises:
        UserError: the run's folder exists, or anything in data, tokenizer or initial checkpoint does not fit the config.
    """
    run_folder = Path(config.runs_folder) / config.name
    # Later processes of the same run find the folder that the first one made.
    first = _is_first_process()
    if first and run_folder.exists():
        raise UserError(
            f"The run folder {run_folder} exists and is not overwritten. Continue that run with --resume {run_folder}, "
            "or choose another name=..."
        )
    config = _with_precision(config)
    datamodule, tokenizer = _open_data(config)
    if first:
        run_folder.mkdir(parents=True)
        write_atomically(run_folder / _CONFIG, to_yaml(config))
        tokenizer.save(run_folder / "tokenizer.json")
    _fit(config, run_folder, datamodule, tokenizer, None)
    return run_folder


def resume(run_folder: Path, stage: type[RunConfig], overrides: Sequence[str] = ()) -> Path:
    """Go on from the run's latest checkpoint; only `trainer.` and `wandb.` keys may be overridden.

    Raises:
        UserError: not a run of this stage, no checkpoint, or an override that would make it another run.
    """
    config = read_run_config(run_folder)
    if not isinstance(config, stage):
        raise UserError(f"{run_folder} is a run of `cola-train {_stage_name(config)}`; resume it with that verb.")
    for override in overrides:
        require(override.startswith(("trainer.", "wandb.")),
                f"'{override}' would make this another run; on resume only trainer.* and wandb.* may change.")  # fmt: skip
    checkpoint = latest_checkpoint(run_folder)
    if overrides:
        config = load_config(type(config), run_folder / _CONFIG, overrides)
    datamodule, tokenizer = _open_data(config)
    if overrides and _is_first_process():
        write_atomically(run_folder / f"config.before-{checkpoint.name}.yaml", (run_folder / _CONFIG).read_bytes())
        write_atomically(run_folder / _CONFIG, to_yaml(config))
    _fit(config, run_folder, datamodule, tokenizer, checkpoint)
    return run_folder


def read_run_config(run_folder: Path) -> VAERunConfig | JointRunConfig:
    """The resolved config that a run was started with."""
    path = run_folder / _CONFIG
    if not path.is_file():
        raise UserError(f"{run_folder} is not a run folder: it has no {_CONFIG}. Runs lie in checkpoints/NAME.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    joint = isinstance(values, dict) and values.get("stage") == "joint"
    return load_config(JointRunConfig if joint else VAERunConfig, path)  # type: ignore[return-value]  # one of the two


def export_run(run_folder: Path, step: int | None, out: Path | None, max_shard_bytes: int) -> Path:
    """Write a saved checkpoint of a run (the latest without `step`) in the released layout; returns the folder.

    Without `out` it replaces RUN/hf; another folder must not exist yet.
    """
    config = read_run_config(run_folder)
    checkpoint = latest_checkpoint(run_folder) if step is None else step_folder(run_folder, step)
    if not checkpoint.is_dir():
        raise UserError(f"{run_folder} has no checkpoint of step {step}; it has {saved_steps(run_folder)}.")
    tokenizer = Tokenizer.load(run_folder / "tokenizer.json")
    target = out or run_folder / "hf"
    export_step(config, checkpoint, step_of(checkpoint), tokenizer, target, replace=out is None, max_shard_bytes=max_shard_bytes)
    return target


def _stage_name(config: RunConfig) -> str:
    return "joint" if isinstance(config, JointRunConfig) else "vae"


def _with_precision(config: RunT) -> RunT:
    """`auto` made definite, so that the saved config says what the run computes in, wherever it is resumed."""
    if config.trainer.precision != "auto":
        return config
    if config.trainer.accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Processors without these instructions emulate bf16, far slower than fp32.
        capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        fast = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision="bf16" if fast else "fp32"))


def _is_first_process() -> bool:
    # Lightning reads the rank from the launcher's environment variables when it is imported.
    return getattr(rank_zero_only, "rank", 0) == 0


def _open_data(config: RunConfig) -> tuple[PreparedDataModule, Tokenizer]:
    """Everything that can be refused before the run exists is refused here."""
    trainer = config.trainer
    datamodule = PreparedDataModule(
        config.data,
        global_batch_size=trainer.global_batch_size,
        micro_batch_size=trainer.micro_batch_size,
        validation_rows=trainer.validation_rows,
        data_seed=config.data_seed,
    )
    tokenizer = datamodule.prepared.tokenizer
    require(tokenizer.vocab_size <= config.vae.vocab_size,
            f"vae.vocab_size ({config.vae.vocab_size}) is below the data's tokenizer, which has {tokenizer.vocab_size} ids; "
            f"set vae.vocab_size={tokenizer.vocab_size}.")  # fmt: skip
    objective = config.objective  # type: ignore[attr-defined]  # both stages have one
    if objective.mask_documents:
        blocks = config.dit if isinstance(config, JointRunConfig) else config.vae
        multiple = config.vae.patch_size * blocks.block_size
        alignment = datamodule.prepared.manifest.document_alignment
        require(
            alignment % multiple == 0,
            f"objective.mask_documents needs documents that start on block boundaries: the data was prepared with "
            f"document_alignment={alignment}, this model needs a multiple of {multiple}. Prepare it again so.",
        )
    if isinstance(config, JointRunConfig):
        for folder in (config.init_vae_from, config.init_dit_from):
            if folder is not None:
                theirs = Tokenizer.load(find_root(folder) / "tokenizer.json")
                datamodule.prepared.check_run(config.data, theirs.sha256)
        if config.init_vae_from is not None:
            check_vae_fits(config.init_vae_from, config.vae)
        if config.init_dit_from is not None:
            check_dit_fits(config.init_dit_from, config.dit)
    return datamodule, tokenizer


def _fit(
    config: RunConfig, run_folder: Path, datamodule: PreparedDataModule, tokenizer: Tokenizer, checkpoint: Path | None
) -> None:
    trainer_config = config.trainer
    _quiet_lightning()
    callbacks: list[pl.Callback] = [
        Metrics(config, run_folder),
        Progress(trainer_config.max_steps),
        Checkpoints(run_folder, trainer_config.checkpoint_every_steps, trainer_config.keep_checkpoints, trainer_config.max_steps),
        ExportAtEnd(config, run_folder, tokenizer),
    ]
    if isinstance(config, JointRunConfig):
        callbacks.append(Samples(config, run_folder, tokenizer))
    validates = trainer_config.validate_every_steps > 0 and datamodule.num_validation_rows > 0
    trainer = pl.Trainer(
        accelerator=trainer_config.accelerator,
        devices=trainer_config.num_processes,
        strategy=ShardedStrategy(trainer_config.num_processes),
        precision="bf16-mixed" if trainer_config.precision == "bf16" else "32-true",
        max_steps=trainer_config.max_steps,
        max_epochs=-1,
        # A batch is an optimizer step, so this interval is in steps.
        val_check_interval=trainer_config.validate_every_steps if validates else None,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=wandb_logger(config, run_folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    stage: StageModule = JointStage(config) if isinstance(config, JointRunConfig) else TextVAEStage(config)
    trainer.fit(stage, datamodule=datamodule, ckpt_path=checkpoint)


def _quiet_lightning() -> None:
    """Leave out Lightning's advertisements and advice that does not fit; its errors still come through."""
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

"""Before a run computes anything: what can be refused is refused, and its folder is made or taken over."""

import contextlib
import dataclasses
from typing import TypeVar

import torch

from cola_train.config.runs import ColaRunConfig, JointRunConfig, RunConfig
from cola_train.config.settings import require
from cola_train.data.datamodule import PreparedDataModule
from cola_train.data.packing import VALIDATION
from cola_train.data.tokenizer import Tokenizer
from cola_train.hf_format import check_dit_fits, check_vae_fits, find_root
from cola_train.processes import cpu_bf16_is_fast, uses_gpu
from cola_train.training.checkpoint import clean, mend_pointer
from cola_train.training.compilation import check_compiler
from cola_train.training.optim import Schedule
from cola_train.training.precision import check_precision
from cola_train.training.run_folder import TOKENIZER, folder_of, locked, saved_config, write_config
from cola_train.training.watch import benchmark_samples

RunT = TypeVar("RunT", bound=RunConfig)


def refuse(config: RunConfig) -> None:
    """Raise what `take_over` would, without touching anything; before processes are started."""
    check_precision(config.trainer)
    saved_config(config)
    check_compiler(config.trainer.compile, uses_gpu(config.trainer.accelerator))
    open_data(config)


def take_over(config: RunT, held: contextlib.ExitStack) -> RunT:
    """Make the run's folder, or take over the one of the same run; on process 0. The run's lock is held until `held` ends.

    Returns:
        The config as it is saved, with nothing left to be decided by the machine.

    Raises:
        UserError: the folder is another run's or in use, or data, tokenizer or initial checkpoints do not fit the config.
    """
    config = with_precision(config, saved_config(config))
    check_compiler(config.trainer.compile, uses_gpu(config.trainer.accelerator))
    _, tokenizer = open_data(config)
    run_folder = folder_of(config)
    run_folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(run_folder))
    clean(run_folder)
    mend_pointer(run_folder)
    write_config(run_folder, config)
    if not (run_folder / TOKENIZER).exists():
        tokenizer.save(run_folder / TOKENIZER)
    return config


def with_precision(config: RunT, saved: RunConfig | None) -> RunT:
    """`auto` made definite, so that the saved config says what the run computes in, wherever it goes on."""
    check_precision(config.trainer)
    if config.trainer.precision != "auto":
        return config
    if saved is not None:
        return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision=saved.trainer.precision))
    on_gpu = uses_gpu(config.trainer.accelerator)
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu_bf16_is_fast()
    return dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, precision="bf16" if fast else "fp32"))


def open_data(config: RunConfig) -> tuple[PreparedDataModule, Tokenizer]:
    """The data of a run; everything that can be refused before the run exists is refused here."""
    trainer = config.trainer
    datamodule = PreparedDataModule(
        config.data,
        global_batch_size=trainer.global_batch_size,
        micro_batch_size=trainer.micro_batch_size,
        validation_rows=trainer.validation_rows,
        data_seed=config.data_seed,
    )
    tokenizer = datamodule.prepared.tokenizer
    key = "vae.vocab_size" if isinstance(config, ColaRunConfig) else "transformer.vocab_size"
    require(tokenizer.vocab_size <= config.vocab_size,
            f"{key} ({config.vocab_size}) is below the data's tokenizer, which has {tokenizer.vocab_size} ids; "
            f"set {key}={tokenizer.vocab_size}.")  # fmt: skip
    Schedule.of(config)
    benchmark_samples(config.watch)
    sees_rows = config.watch.is_on and config.watch.instruments != ["benchmarks"]
    require(not sees_rows or datamodule.prepared.num_rows(VALIDATION) > 0,
            f"watch.instruments={config.watch.instruments} looks at held-out rows, and {config.data.path} has none; prepare it "
            "with held_out_share above 0.")  # fmt: skip
    if isinstance(config, ColaRunConfig) and config.objective.mask_documents:  # type: ignore[attr-defined]  # both stages have one
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

"""Sample texts while a run trains: what the model would say now, in samples.jsonl of the run
folder.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cola_train.config.run import RunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.generate import generate
from cola_train.files import JsonlWriter
from cola_train.run_layout import SAMPLES
from cola_train.training.checkpoints.snapshot import gathered_weights, plain_copy
from cola_train.training.loop.module import StageModule


class Samples(pl.Callback):
    """Generates from `trainer.sample_prompts` every `trainer.sample_every_steps`, always with the
    same noise.
    """

    def __init__(self, config: RunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
        self.config, self.lines, self.tokenizer = (
            config,
            JsonlWriter(run_folder / SAMPLES),
            tokenizer,
        )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Sample, on process 0, from a plain copy."""
        assert isinstance(pl_module, StageModule)
        every, step = self.config.trainer.sample_every_steps, pl_module.state.step
        if not every or step % every or pl_module.stop_requested:
            return
        pl_module.watchdog.beat(f"writing sample texts after step {step}")
        weights = gathered_weights(pl_module)
        if not pl_module.processes.is_first:
            return
        checkpoint = plain_copy(pl_module, weights, self.tokenizer)
        prompts = self.config.trainer.sample_prompts
        results = generate(
            checkpoint,
            prompts,
            SamplerConfig(max_new_tokens=max(1, self.config.data.seq_len // 2)),
        )
        for prompt, result in zip(prompts, results, strict=True):
            self.lines.append({"step": step, "prompt": prompt, "text": result.text})

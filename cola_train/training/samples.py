"""Sample texts while stage 2 trains: what the model would say now, in samples.jsonl of the run folder."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from cola_train.config.runs import JointRunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.sampling.generate import generate
from cola_train.training.export import checkpoint_of, full_weights
from cola_train.training.module import StageModule


class Samples(pl.Callback):
    """Generates from `trainer.sample_prompts` every `trainer.sample_every_steps`, always with the same noise."""

    def __init__(self, config: JointRunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
        self.config, self.path, self.tokenizer = config, run_folder / "samples.jsonl", tokenizer

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample on process 0 from a plain copy: a sharded network must not be called outside its root."""
        every, step = self.config.trainer.sample_every_steps, trainer.global_step
        if not every or step % every:
            return
        assert isinstance(pl_module, StageModule)
        weights = full_weights(pl_module)
        if not trainer.is_global_zero:
            return
        checkpoint = checkpoint_of(self.config, weights, step, self.tokenizer)
        for network in (checkpoint.vae, checkpoint.dit):
            assert network is not None
            network.to(pl_module.device)
        prompts = self.config.trainer.sample_prompts
        results = generate(checkpoint, prompts, SamplerConfig(max_new_tokens=max(1, self.config.data.seq_len // 2)))
        with self.path.open("a", encoding="utf-8") as file:
            for prompt, result in zip(prompts, results, strict=True):
                file.write(json.dumps({"step": step, "prompt": prompt, "text": result.text}, ensure_ascii=False) + "\n")

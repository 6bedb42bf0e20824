"""Sample texts while a run trains: what the model would write now, in the run's samples.jsonl."""

from pathlib import Path

from cola_train.config.run import RunConfig
from cola_train.config.sampling import SamplerConfig
from cola_train.data.tokenizer import Tokenizer
from cola_train.families.generate import generate
from cola_train.files import JsonlWriter
from cola_train.run_layout import SAMPLES
from cola_train.training.callbacks.stage_callback import StageCallback
from cola_train.training.checkpoints.snapshot import gathered_weights, plain_copy
from cola_train.training.loop.module import StageModule


class Samples(StageCallback):
    """Continues `trainer.sample_prompts` every `sample_every_steps`, always with the same noise."""

    def __init__(self, config: RunConfig, run_folder: Path, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.lines = JsonlWriter(run_folder / SAMPLES)

    def after_step(self, stage: StageModule) -> None:
        every, step = self.config.trainer.sample_every_steps, stage.state.step
        if not every or step % every or stage.stop_requested:
            return
        stage.watchdog.beat(f"writing sample texts after step {step}")
        weights = gathered_weights(stage)
        if not stage.processes.is_first:
            return
        checkpoint = plain_copy(stage, weights, self.tokenizer)
        prompts = self.config.trainer.sample_prompts
        sampler = SamplerConfig(max_new_tokens=max(1, self.config.data.seq_len // 2))
        for prompt, result in zip(prompts, generate(checkpoint, prompts, sampler), strict=True):
            self.lines.append({"step": step, "prompt": prompt, "text": result.text})

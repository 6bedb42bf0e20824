"""Trains the configs in the folders given as arguments, one after another, in the processes that
torchrun started; not a test.

Beside each run it leaves, for every process, the checksum of every draw that its losses were
computed from, by purpose and sample.
"""

import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cola_train.config.run import RunConfig
from cola_train.families.cola import stage1, stage2
from cola_train.families.masked_diffusion import objective as masked_diffusion
from cola_train.processes import end_process, launched_rank
from cola_train.randomness import Purpose
from cola_train.run_folder import read_run_config
from cola_train.run_layout import folder_of
from cola_train.training.run import train

torch.set_num_threads(1)
draws: dict[str, int] = {}


def recorded(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(seed: int, purpose: Purpose, sample_index: Tensor, *rest: int) -> Tensor:
        drawn = draw(seed, purpose, sample_index, *rest)
        for sample, row in zip(sample_index.tolist(), drawn, strict=True):
            draws[f"{purpose.name} {sample}"] = zlib.crc32(row.numpy().tobytes())
        return drawn

    return run


for module in (stage1, stage2):
    module.normal, module.uniform = recorded(module.normal), recorded(module.uniform)
masked_diffusion.uniform = recorded(masked_diffusion.uniform)


def run(config: RunConfig) -> None:
    draws.clear()
    train(config)
    (folder_of(config) / f"draws-{launched_rank()}.json").write_text(json.dumps(draws))


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        run(read_run_config(Path(folder)))
    end_process(0)

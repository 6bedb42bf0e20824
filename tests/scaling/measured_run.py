"""`python -m tests.scaling.measured_run CONFIG WARM_UP_CONFIG`: train, and print by how many bytes
the process grew.
"""

import gc
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from cola_train.data.batch import Batch
from cola_train.families.registry import load_run_config
from cola_train.training.loop.module import StageModule
from cola_train.training.run import train


def resident(key: str) -> int:
    """The kernel's count of this process' resident bytes: VmRSS is now, VmHWM the most since it was
    last set back.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


class Measure:
    """From just before the model is built to the end of the last step: what is saved after that is
    no part of a step.
    """

    def __init__(self) -> None:
        self.idle = self.peak = 0
        build, step = StageModule.configure_model, StageModule.training_step

        def configure_model(stage: StageModule) -> None:
            if not hasattr(stage, "objective"):
                # The warm-up's trainer and networks refer to each other: when they go is chance.
                gc.collect()
                Path("/proc/self/clear_refs").write_text("5")
                self.idle = resident("VmRSS")
            build(stage)

        def training_step(stage: StageModule, batch: Batch, batch_idx: int) -> Any:
            step(stage, batch, batch_idx)
            self.peak = resident("VmHWM")

        self.hooks = mock.patch.multiple(
            StageModule, configure_model=configure_model, training_step=training_step
        )


def main(config: str, warm_up: str) -> None:
    """A small run comes first, so that libraries are loaded, and their own memory taken, before the
    measurement.
    """
    train(load_run_config(Path(warm_up)))
    measure = Measure()
    with measure.hooks:
        train(load_run_config(Path(config)))
    print(f"grew {measure.peak - measure.idle}")


if __name__ == "__main__":
    main(*sys.argv[1:])

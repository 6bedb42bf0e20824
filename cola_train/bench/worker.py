"""A measuring process of its own: its peak memory is of what it measures, and nothing that ran
before slows it down.

Run as a program, this module is one: its arguments are the kind, the device to sample on, then
settings.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from cola_train.bench.config import (
    BenchSampleConfig,
    BenchTrainConfig,
    Kind,
    MeasuringConfig,
    split_settings,
)
from cola_train.config.load import leaves, load_config, value_at
from cola_train.config.settings import UserError


class MemoryTooSmallError(UserError):
    """What is measured needs more memory than there is."""


_RESULT = "cola_train measured: "


def measure_in_a_process(
    kind: Kind, config: MeasuringConfig, of_run: Sequence[str] = (), device: str = "auto"
) -> dict[str, Any]:
    """What `measure_train` or `measure_sample` finds in a fresh process; its progress goes to
    stderr.

    Its environment is the user's, an allocator's settings in it too, but for OMP_NUM_THREADS, which
    is config.threads.

    Raises:
        UserError: of the measuring process; or it was killed, as a system without memory does.
    """
    settings = [f"{key}={json.dumps(value_at(config, key))}" for key, _ in leaves(type(config))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(config.threads)}
    done = subprocess.run(
        [sys.executable, "-m", __name__, kind, device, *settings, *of_run],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode < 0:
        killed = f"The measuring process was killed by signal {-done.returncode}"
        if done.returncode == -signal.SIGKILL:
            raise MemoryTooSmallError(
                f"{killed}, as a system does whose memory has run out: measure less at a time."
            )
        raise UserError(f"{killed}; measure again.")
    results = [
        line.removeprefix(_RESULT) for line in done.stdout.splitlines() if line.startswith(_RESULT)
    ]
    if not results:
        raise RuntimeError(
            f"The measuring process failed (status {done.returncode}); its own message is above."
        )
    result: dict[str, Any] = json.loads(results[-1])
    if "refused" in result:
        raise (MemoryTooSmallError if result["memory"] else UserError)(result["refused"])
    return result


def _measure(kind: str, device: str, settings: Sequence[str]) -> dict[str, Any]:
    if kind == "train":
        own, of_run = split_settings(settings)
        from cola_train.bench.train import measure_train
        from cola_train.bench.workloads import run_config

        config = load_config(BenchTrainConfig, None, own)
        return measure_train(config, run_config(config, of_run))
    from cola_train.bench.sample import measure_sample

    return measure_sample(load_config(BenchSampleConfig, None, settings), device)


def _out_of_memory() -> type[Exception]:
    import torch

    return torch.OutOfMemoryError


def _main() -> None:
    kind, device, *settings = sys.argv[1:]
    try:
        result = _measure(kind, device, settings)
    except UserError as error:
        result = {"refused": str(error), "memory": isinstance(error.__context__, _out_of_memory())}
    sys.stdout.write(f"\n{_RESULT}{json.dumps(result)}\n")


if __name__ == "__main__":
    _main()

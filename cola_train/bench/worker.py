"""A measuring process of its own: its peak memory is that of what it measures, nothing ran before.

Run as a program, this module is one: its arguments are the kind, the device to sample on, then
settings.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Literal

from cola_train.bench.config import (
    BenchSampleConfig,
    BenchTrainConfig,
    MeasuringConfig,
    MemoryTooSmallError,
    split_settings,
)
from cola_train.config.load import leaves, load_config, value_at
from cola_train.config.settings import UserError
from cola_train.console import say
from cola_train.json_text import parse_json

# A doubling of the rows must gain as much, or it is the last.
_LEAST_GAIN = 1.01
Kind = Literal["train", "sample"]
_RESULT = "cola_train measured: "


def measure_in_a_process(
    kind: Kind, config: MeasuringConfig, of_run: Sequence[str] = (), device: str = "auto"
) -> dict[str, Any]:
    """The result of `measure_train` or `measure_sample` in a fresh process; progress is on stderr.

    Its environment is the user's, an allocator's settings included, except for OMP_NUM_THREADS,
    which is config.threads.

    Raises:
        UserError: of the measuring process; or it was killed, as a system without memory does.
    """
    settings = [f"{key}={json.dumps(value_at(config, key))}" for key, _ in leaves(type(config))]
    done = subprocess.run(
        [sys.executable, "-m", __name__, kind, device, *settings, *of_run],
        env={**os.environ, "OMP_NUM_THREADS": str(config.threads)},
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
    results = [line for line in done.stdout.splitlines() if line.startswith(_RESULT)]
    if not results:
        raise RuntimeError(
            f"The measuring process failed (status {done.returncode}); its own message is above."
        )
    result: dict[str, Any] = parse_json(results[-1].removeprefix(_RESULT))
    if "refused" in result:
        raise (MemoryTooSmallError if result["memory"] else UserError)(result["refused"])
    return result


def run_train(config: BenchTrainConfig, of_run: Sequence[str]) -> dict[str, Any]:
    """Measure a training step in a fresh process; with `find_rows`, at the fastest micro-batch.

    `of_run` are settings of the run that override the workload's, key=value.

    Raises:
        UserError: whatever the settings are refused for; memory that is too small for the first
            micro-batch.
    """
    if not config.find_rows:
        return measure_in_a_process("train", config, of_run)
    rows, tried = _find_rows(config, of_run)
    config = dataclasses.replace(config, rows=rows, find_rows=False)
    return {**measure_in_a_process("train", config, of_run), "tried": tried}


def _find_rows(config: BenchTrainConfig, of_run: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
    """The micro-batch of most tokens per second; and each that was tried.

    These are config.rows (1 by default), twice as many, and so on: until memory ends, or up to a
    doubling that gains less than 1 %.
    """
    rows = config.rows or 1
    short = dataclasses.replace(config, find_rows=False, profile=False, warmups=1, runs=2)
    tried: list[dict[str, Any]] = []
    while True:
        try:
            found = measure_in_a_process("train", dataclasses.replace(short, rows=rows), of_run)
        except MemoryTooSmallError:
            if not tried:
                raise
            say(f"{rows} rows do not fit into memory.")
            break
        speed = found["tokens_per_second"]
        gains = not tried or speed > _LEAST_GAIN * tried[-1]["tokens_per_second"]
        peak = found["memory"]["peak_bytes"]
        tried.append({"rows": rows, "tokens_per_second": speed, "peak_bytes": peak})
        say(f"{rows} rows: {speed:.6g} tokens/s")
        if not gains:
            break
        rows *= 2
    return max(tried, key=lambda one: one["tokens_per_second"])["rows"], tried


def _main() -> None:
    kind, device, *settings = sys.argv[1:]
    try:
        if kind == "train":
            from cola_train.bench.train import measure_train
            from cola_train.bench.workloads import run_config

            own, of_run = split_settings(settings)
            config = load_config(BenchTrainConfig, None, own)
            result = measure_train(config, run_config(config, of_run))
        else:
            from cola_train.bench.sample import measure_sample

            result = measure_sample(load_config(BenchSampleConfig, None, settings), device)
    except UserError as error:
        result = {"refused": str(error), "memory": isinstance(error, MemoryTooSmallError)}
    sys.stdout.write(f"\n{_RESULT}{json.dumps(result)}\n")


if __name__ == "__main__":
    _main()

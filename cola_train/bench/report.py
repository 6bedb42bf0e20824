"""From what was measured to what is reported: medians and spread, rates, shares of peaks."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cola_train.bench.machine import Clock, Memory, data_sheet_flops, device_name, gflops
from cola_train.config.loop import Convention
from cola_train.devices import matrix_seconds

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Speedometer:
    """How fast the machine multiplies matrices before and after something is measured, by
    precision.
    """

    def __init__(self, clock: Clock) -> None:
        # Rates of a CPU are all by its fp32 rate, whatever it computes in.
        self._clock = clock
        self._dtypes = _DTYPES if clock.device.type == "cuda" else {"fp32": torch.float32}
        self._seconds: list[dict[str, list[float]]] = []

    def read(self) -> None:
        """Measure once more; before and after."""
        self._seconds.append(
            {
                name: matrix_seconds(self._clock.device, dtype, self._clock.read)
                for name, dtype in self._dtypes.items()
            }
        )

    def gflops(self, precision: str) -> float:
        """The median rate over all readings, in `precision` if it is measured."""
        name = precision if precision in self._dtypes else "fp32"
        return gflops(
            self._clock.device, [seconds for reading in self._seconds for seconds in reading[name]]
        )

    def report(self) -> dict[str, Any]:
        """The machine, with the rate of each reading."""
        device = self._clock.device
        return {
            "device": device_name(device),
            "device_type": device.type,
            "threads": self._clock.threads,
            "clock": self._clock.kind,
            "torch": torch.__version__,
            "matrix_gflops": {
                name: {
                    "median": self.gflops(name),
                    "readings": [gflops(device, reading[name]) for reading in self._seconds],
                }
                for name in self._dtypes
            },
        }


def spread(runs: Sequence[float]) -> dict[str, Any]:
    """Runs with their median, extremes and quartiles."""
    lower, _, upper = (
        statistics.quantiles(runs, n=4, method="inclusive") if len(runs) > 1 else (runs[0],) * 3
    )
    return {
        "median": statistics.median(runs),
        "min": min(runs),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "max": max(runs),
        "runs": list(runs),
    }


def speed(
    tokens: int, seconds: float, speedometer: Speedometer, precision: str
) -> dict[str, float]:
    """Tokens per second, and that per GFLOP/s of the machine's measured matrix rate, which compares
    across machines.
    """
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_gflops": tokens / seconds / speedometer.gflops(precision),
    }


def utilization(
    flops: Mapping[Convention, int],
    seconds: float,
    clock: Clock,
    speedometer: Speedometer,
    precision: str,
) -> dict[str, Any]:
    """FLOPs by convention, and each as a share of the peak: of a CPU its measured matrix rate, of a
    GPU its data sheet's.

    Of an unknown GPU the shares are None.
    """
    peak = (
        data_sheet_flops(clock.device, precision)
        if clock.device.type == "cuda"
        else speedometer.gflops("fp32") * 1e9
    )
    return {
        "flops": dict(flops),
        "peak_flops_per_second": peak,
        "mfu": {
            name: None if peak is None else count / seconds / peak for name, count in flops.items()
        },
    }


def used(memory: Memory) -> dict[str, int]:
    """Bytes: before the first run, at the highest moment, and by how much they grew."""
    peak = memory.peak()
    return {"before_bytes": memory.begin, "peak_bytes": peak, "growth_bytes": peak - memory.begin}

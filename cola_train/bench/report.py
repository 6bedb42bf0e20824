"""From what was measured to what is reported: medians and spread, rates, shares of peaks."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cola_train.bench.machine import Clock, device_name, gflops
from cola_train.config.loop import Convention
from cola_train.devices import device_peak, matrix_seconds

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Speedometer:
    """The machine's matrix rate by precision, before and after something is measured."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._device = clock, clock.device
        # On a CPU all rates are relative to its fp32 rate, whatever it computes in.
        self._dtypes = _DTYPES if self._device.type == "cuda" else {"fp32": torch.float32}
        self._readings: list[dict[str, list[float]]] = []

    def read(self) -> None:
        """Measure once more; to be called before and after what is measured."""
        reading = {
            name: matrix_seconds(self._device, dtype, self._clock.read)
            for name, dtype in self._dtypes.items()
        }
        self._readings.append(reading)

    def gflops(self, precision: str) -> float:
        """The median rate over all readings, in `precision` if it is measured."""
        name = precision if precision in self._dtypes else "fp32"
        return gflops(self._device, [s for reading in self._readings for s in reading[name]])

    def report(self) -> dict[str, Any]:
        """The machine, with the rate of each reading."""
        rates = {
            name: {
                "median": self.gflops(name),
                "readings": [gflops(self._device, reading[name]) for reading in self._readings],
            }
            for name in self._dtypes
        }
        return {
            "device": device_name(self._device),
            "device_type": self._device.type,
            "threads": self._clock.threads,
            "clock": self._clock.kind,
            "torch": torch.__version__,
            "matrix_gflops": rates,
        }

    def rates(
        self, tokens: int, flops: Mapping[Convention, int], seconds: float, precision: str
    ) -> dict[str, Any]:
        """Tokens per second, also per GFLOP/s of matrix rate (which compares across machines); MFU.

        MFU is `flops`, by convention, as a share of the peak: of a CPU its measured matrix rate, of
        a GPU its data sheet's. For an unknown GPU it is None.
        """
        on_gpu = self._device.type == "cuda"
        peak = device_peak(self._device, precision) if on_gpu else self.gflops("fp32") * 1e9
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_gflops": tokens / seconds / self.gflops(precision),
            "flops": dict(flops),
            "peak_flops_per_second": peak,
            "mfu": {
                name: None if peak is None else count / seconds / peak
                for name, count in flops.items()
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

"""How measurements are made and reported: time, memory, matrix rates, and shares of peaks."""

import contextlib
import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from cola_train.config.loop import Convention
from cola_train.devices import device_peak, matrix_flops, matrix_seconds

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Clock:
    """Reads the time that a device has worked.

    For one CPU thread that is the process' CPU time, which other programs on the machine disturb
    little; for several, and for a GPU, it is wall-clock time.
    """

    device: torch.device
    threads: int

    @property
    def kind(self) -> str:
        """Which time its seconds measure: "cpu" or "wall"."""
        return "cpu" if self.device.type == "cpu" and self.threads == 1 else "wall"

    def read(self) -> float:
        """Seconds since a fixed moment, once all work that was started is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.kind == "cpu" else time.perf_counter()

    def time(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes."""
        begin = self.read()
        work()
        return self.read() - begin


def gflops(device: torch.device, seconds: list[float]) -> float:
    """The rate, in 10^9 FLOPs per second, of matrix products (devices.py) with these times."""
    return matrix_flops(device) / statistics.median(seconds) / 1e9


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
        return {
            "device": device_name(self._device),
            "device_type": self._device.type,
            "threads": self._clock.threads,
            "clock": self._clock.kind,
            "torch": torch.__version__,
            "matrix_gflops": {
                name: {
                    "median": self.gflops(name),
                    "readings": [gflops(self._device, reading[name]) for reading in self._readings],
                }
                for name in self._dtypes
            },
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


class Memory:
    """The memory of a process (CPU) or of its tensors (GPU), from this object's creation on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.begin = torch.cuda.memory_allocated(device)
            return
        # The peak so far may be that of building the networks. Where it cannot be reset, it counts.
        with contextlib.suppress(OSError):
            _RESET_PEAK.write_text("5")
        self.begin = psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most bytes so far, including those at the beginning."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        # Where there is /proc, not getrusage: its peak begins with that of the process' parent.
        if _STATUS.exists():
            status = _STATUS.read_text().splitlines()
            (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return max(peak, self.begin)

    def used(self) -> dict[str, int]:
        """Bytes: at the beginning, at the peak, and their difference."""
        peak = self.peak()
        return {"before_bytes": self.begin, "peak_bytes": peak, "growth_bytes": peak - self.begin}


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


def device_name(device: torch.device) -> str:
    """The device's name by its driver, or by the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = dict(getattr(torch.cpu, "get_capabilities", dict)()).get("cpu_name")
    return f"{name or platform.processor() or 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"

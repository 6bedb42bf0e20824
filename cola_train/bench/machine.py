"""A process' time and memory, and the machine's matrix rate, by which speeds are compared."""

import contextlib
import dataclasses
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from cola_train.devices import matrix_flops

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
        return max(_peak_rss(), self.begin)

    def used(self) -> dict[str, int]:
        """Bytes: at the beginning, at the peak, and their difference."""
        peak = self.peak()
        return {"before_bytes": self.begin, "peak_bytes": peak, "growth_bytes": peak - self.begin}


def _peak_rss() -> int:
    # Where there is /proc, not getrusage: its peak begins with that of the process' parent.
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """The device's name by its driver, or by the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = dict(getattr(torch.cpu, "get_capabilities", dict)()).get("cpu_name")
    return f"{name or platform.processor() or 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"

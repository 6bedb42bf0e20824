"""What time and memory a process takes, and how fast the machine multiplies matrices: what speeds
are compared by.
"""

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
from cola_train.peaks import find_device

_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclasses.dataclass(frozen=True)
class Clock:
    """Reads the time that a device has worked.

    Of one CPU thread that is the process' CPU time, which other programs on the machine disturb
    little; of several, and of a GPU, it is the time on the wall.
    """

    device: torch.device
    threads: int

    @property
    def kind(self) -> str:
        """What its seconds are of."""
        return "cpu" if self.device.type == "cpu" and self.threads == 1 else "wall"

    def read(self) -> float:
        """Seconds from a fixed moment, once everything that was started has been done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.kind == "cpu" else time.perf_counter()

    def time(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes."""
        begin = self.read()
        work()
        return self.read() - begin


def gflops(device: torch.device, seconds: list[float]) -> float:
    """10^9 FLOPs per second of matrix products that took so long (devices.py), by their median."""
    return matrix_flops(device) / statistics.median(seconds) / 1e9


class Memory:
    """The memory of a process (CPU) or of its tensors (GPU), from a moment on: how much there was,
    and the most there has been.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.begin = torch.cuda.memory_allocated(device)
            return
        # The peak so far may be that of building the networks. Where it cannot be forgotten, it
        # counts.
        with contextlib.suppress(OSError):
            _RESET_PEAK.write_text("5")
        self.begin = psutil.Process().memory_info().rss

    def peak(self) -> int:
        """The most bytes since the beginning, what was there then included."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(_peak_rss(), self.begin)


def _peak_rss() -> int:
    """Bytes. Not getrusage where the kernel says it better: what that gives begins with the peak of
    the process' parent.
    """
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_name(device: torch.device) -> str:
    """As its driver, or the processor, calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = dict(getattr(torch.cpu, "get_capabilities", dict)()).get("cpu_name")
    return f"{name or platform.processor() or 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"


def data_sheet_flops(device: torch.device, precision: str) -> float | None:
    """FLOPs per second that a GPU's vendor gives for `precision`, "bf16" or "fp32"; None of a CPU
    or an unknown GPU.
    """
    known = find_device(device_name(device)) if device.type == "cuda" else None
    return None if known is None else known.peak(precision)

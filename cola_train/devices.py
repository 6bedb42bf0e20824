"""This machine's devices: which one a name means, what it can do, how fast it multiplies."""

import functools
import time
from collections.abc import Callable

import torch

from cola_train.config.settings import UserError
from cola_train.peaks import find_device

_CPU_SIZE, _GPU_SIZE = 1024, 8192
_PRODUCTS = 10
_ENOUGH_SECONDS = 1.0


def named_device(name: str) -> torch.device:
    """The device of --device: cpu, cuda, cuda:1, ...; auto is a GPU if there is one.

    Raises:
        UserError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().split("\n", 1)[0]
        reason = f"--device {name} is not usable here ({first}); try cpu, cuda or auto."
        raise UserError(reason) from None
    return device


def uses_gpu(accelerator: str) -> bool:
    """Whether trainer.accelerator means a GPU on this machine."""
    return accelerator != "cpu" and torch.cuda.is_available()


def cpu_bf16_is_fast() -> bool:
    """Whether the CPU multiplies matrices faster in bf16 than in fp32.

    AMX does. AVX-512's own bf16 instructions took twice as long as fp32 on all shapes of a small
    model (torch 2.13), and without either bf16 is emulated.
    """
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities.get("amx_bf16", False)


@functools.cache
def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOPs per second in "bf16" or "fp32": a GPU's by a table (or None), a CPU's measured once."""
    if device.type == "cuda":
        known = find_device(torch.cuda.get_device_name(device))
        return None if known is None else known.peak(precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # The minimum: whatever else runs on the machine only makes it slower.
    return matrix_flops(device) / min(matrix_seconds(device, dtype))


def matrix_seconds(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Seconds of each of up to ten products of square matrices: 1024 wide on a CPU, 8192 on a GPU.

    There are fewer where one takes long, as bf16 does on a CPU that emulates it.

    `clock` is read once everything that was started has been done.
    """
    size = _matrix_size(device)
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) <= _PRODUCTS and sum(seconds) < _ENOUGH_SECONDS:
        begin = clock()
        torch.mm(one, other)
        seconds.append(clock() - begin)
    # The first one also does work that later ones do not.
    return seconds[1:] or seconds


def matrix_flops(device: torch.device) -> int:
    """FLOPs of one of these products."""
    return 2 * _matrix_size(device) ** 3


def _matrix_size(device: torch.device) -> int:
    return _GPU_SIZE if device.type == "cuda" else _CPU_SIZE

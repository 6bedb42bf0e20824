"""The peak rate of the device that a run computes on: of a GPU from a table, of a CPU measured."""

import time

import torch

from cola_train.flops.peaks import find_device

_SIZE, _REPEATS = 1024, 10


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOPs per second in `precision`, "bf16" or "fp32"; None for a GPU that the table does not have."""
    if device.type == "cuda":
        known = find_device(torch.cuda.get_device_name(device))
        return None if known is None else known.peak(precision)
    return matrix_rate(torch.bfloat16 if precision == "bf16" else torch.float32)


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOPs per second of a product of two 1024 x 1024 matrices with this process' threads: the fastest of ten.

    Whatever else runs on the machine only makes it slower.
    """
    one, other = (torch.ones(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - begin)
    return 2 * _SIZE**3 / min(seconds)

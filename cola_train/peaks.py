"""Devices' peak rates, the denominators of MFU and HFU, and the memory that a plan may fill."""

import dataclasses

from cola_train.config.settings import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """An accelerator: its memory, and dense rates in FLOPs per second (vendors' data sheets)."""

    bf16: float
    fp32: float  # without TF32, which torch leaves off by default
    memory_bytes: int

    def peak(self, precision: str) -> float:
        """The rate in `precision`: "fp32" or "bf16"; "fp8" counts shares of the bf16 peak."""
        return self.fp32 if precision == "fp32" else self.bf16


DEVICES = {
    "A100": Device(312e12, 19.5e12, 80 * 10**9),
    "H100": Device(989.4e12, 66.9e12, 80 * 10**9),
    "H100 PCIe": Device(756e12, 51e12, 80 * 10**9),
    "H200": Device(989.4e12, 66.9e12, 141 * 10**9),
    "B200": Device(2250e12, 75e12, 180 * 10**9),
    "MI300X": Device(1307.4e12, 163.4e12, 192 * 10**9),
}


def find_device(name: str) -> Device | None:
    """The device by its driver's name, such as "NVIDIA H100 80GB HBM3"; None if unknown."""
    known = [key for key in DEVICES if key.lower() in name.lower()]
    return DEVICES[max(known, key=len)] if known else None


def device_named(name: str) -> Device:
    """A device by the name that a user gives.

    Raises:
        UserError: none of ours.
    """
    if name not in DEVICES:
        hint = nearest(name, DEVICES)
        raise UserError(f"There is no device {name!r} in the table of peaks; {hint}")
    return DEVICES[name]

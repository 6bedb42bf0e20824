"""What devices can do at most: the denominators of MFU and HFU, and how much memory a plan may
fill.
"""

import dataclasses

from cola_train.config.settings import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Device:
    """A kind of accelerator: dense rates, without sparsity, in FLOPs per second (vendors' data
    sheets), and its memory.
    """

    bf16: float
    fp32: float  # without TF32, which torch leaves off by default
    memory_bytes: int

    def peak(self, precision: str) -> float:
        """The rate in `precision`: "fp32" or "bf16", which is also what shares of the peak are of
        in "fp8".
        """
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
    """The device that a driver's name, such as "NVIDIA H100 80GB HBM3", is of; None if it is none
    of these.
    """
    known = [key for key in DEVICES if key.lower() in name.lower()]
    return DEVICES[max(known, key=len)] if known else None


def device_named(name: str) -> Device:
    """A device by the name that a user gives.

    Raises:
        UserError: none of ours.
    """
    if name not in DEVICES:
        raise UserError(
            f"There is no device {name!r} in the table of peaks; {nearest(name, DEVICES)}"
        )
    return DEVICES[name]

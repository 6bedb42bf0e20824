"""The software and hardware of this machine, as a training would find them."""

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from cola_train.devices import cpu_bf16_is_fast

_PROJECT = "cola-train"
_LIBRARIES = ("lightning", "numpy", "safetensors", "tokenizers", "datasets")


@dataclass(frozen=True)
class Versions:
    """The software that is installed."""

    found: dict[str, str]  # name -> version
    unmet: tuple[tuple[str, str], ...]  # dependencies: what is there, what is needed

    def lines(self) -> list[tuple[str, str]]:
        return list(self.found.items())


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch can use; `bf16` in hardware, not emulated."""

    name: str
    memory_bytes: int
    capability: str
    bf16: bool

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.memory_bytes / 1e9:.1f} GB, compute capability {self.capability}, "
            f"{'bf16' if self.bf16 else 'no bf16'}"
        )


@dataclass(frozen=True)
class Devices:
    """Processor, memory, GPUs and the clock."""

    cpu: str
    cores: int
    usable_cores: int
    memory_bytes: int
    available_bytes: int
    omp_num_threads: str | None
    torch_threads: int
    cpu_bf16: bool
    gpus: tuple[Gpu, ...]
    peers: tuple[tuple[int, int], ...]  # ordered pairs of GPUs, one reads the other's memory
    clock: str

    def lines(self) -> list[tuple[str, str]]:
        gpus = [(f"GPU {index}", str(gpu)) for index, gpu in enumerate(self.gpus)]
        pairs = len(self.gpus) * (len(self.gpus) - 1)
        memory, free = self.memory_bytes / 1e9, self.available_bytes / 1e9
        threads = f"{self.omp_num_threads or 'not set'} (threads of torch: {self.torch_threads})"
        bf16 = "fast" if self.cpu_bf16 else "slow: precision auto takes fp32 there"
        return [
            ("CPU", self.cpu),
            ("cores", f"{self.usable_cores} usable by this process, of {self.cores}"),
            ("memory", f"{memory:.1f} GB, {free:.1f} GB available"),
            ("OMP_NUM_THREADS", threads),
            ("bf16 on the CPU", bf16),
            *(gpus or [("GPU", "none")]),
            *([("P2P", f"{len(self.peers)} of {pairs} pairs of GPUs")] if pairs else []),
            ("clock", self.clock),
        ]


def read_versions() -> Versions:
    """Versions of cola_train, python, the libraries, and the GPU software that there is."""
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    found = {
        "cola_train": _version(_PROJECT) or "not installed, runs from its source",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": None if nccl is None else ".".join(map(str, nccl)),
        "cuDNN": torch.backends.cudnn.version(),
        "NVIDIA driver": _nvidia_driver(),
        **{name: _version(name) or "missing" for name in _LIBRARIES},
    }
    versions = {name: str(version) for name, version in found.items() if version is not None}
    return Versions(versions, tuple(_unmet_requirements()))


def read_devices() -> Devices:
    """Processor, memory and GPUs, now."""
    memory = psutil.virtual_memory()
    cores = os.cpu_count() or 1
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    # A torch too old for get_capabilities is for the report to say.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    model = capabilities.get("cpu_name") or platform.processor() or "model unknown"
    return Devices(
        cpu=f"{model}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        cores=cores,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        memory_bytes=memory.total,
        available_bytes=memory.available,
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        torch_threads=torch.get_num_threads(),
        cpu_bf16=cpu_bf16_is_fast(),
        gpus=tuple(_gpu(index) for index in gpus),
        peers=tuple(
            (a, b) for a in gpus for b in gpus if a != b and torch.cuda.can_device_access_peer(a, b)
        ),
        clock=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(found.name, found.total_memory, f"{found.major}.{found.minor}", bf16)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet_requirements() -> list[tuple[str, str]]:
    lines = importlib.metadata.requires(_PROJECT) if _version(_PROJECT) else None
    unmet = []
    for requirement in map(Requirement, lines or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, needed = _version(requirement.name), requirement.specifier
        if version is None or not needed.contains(version, prereleases=True):
            found = f"{requirement.name} {version or 'missing'}"
            unmet.append((found, str(needed) or "any version"))
    return unmet


def _nvidia_driver() -> str | None:
    """The version of the driver, if nvidia-smi is there and sees a GPU."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    except (OSError, subprocess.CalledProcessError):
        return None  # images with CUDA bring nvidia-smi to machines without a GPU, too
    return done.stdout.partition("\n")[0].strip() or None

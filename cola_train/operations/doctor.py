"""`cola-train doctor`: what a machine or job offers a training, its speed, and what is wrong."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from cola_train.config.settings import require
from cola_train.console import aligned
from cola_train.operations.bandwidth import Bandwidth, measure_bandwidth
from cola_train.operations.disk import Disk, existing_folder, measure_disk
from cola_train.operations.job import Launcher, current_job, is_loopback, read_launcher
from cola_train.operations.machine import Devices, Versions, read_devices, read_versions
from cola_train.operations.report import report

FREE_GB = 20
OPEN_FILES = 1024
SHARED_MEMORY_MB = 64
_EARLIEST_CLOCK = datetime(2024, 1, 1, tzinfo=UTC)
# Each has `lines`: name and text of each line of the report.
_SectionT = TypeVar("_SectionT", bound=Versions | Devices | Launcher | Bandwidth | Disk)


@dataclass(frozen=True)
class Facts:
    """All that the report says, section by section."""

    versions: Versions
    devices: Devices
    launcher: Launcher
    bandwidth: Bandwidth
    disk: Disk


@dataclass(frozen=True)
class Problem:
    """Something that will stop or slow a training."""

    rule: str
    found: str
    needed: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}; needed: {self.needed}; next: {self.next_step}"


def doctor(folder: Path, num_processes: int, as_json: bool) -> int:
    """Report to stdout on versions, devices, launcher, bandwidth, disk and what is wrong.

    Args:
        folder: where runs are to lie; if it does not exist, the nearest folder above it is
            measured. Nothing stays there.
        num_processes: workers between which to measure bandwidth on this machine. Under torchrun it
            is measured between the job's processes instead, and only rank 0 reports.
        as_json: one JSON object rather than text: the fields of `Facts`, and `problems`.

    Returns:
        The exit status: 1 if something is wrong, otherwise 0. Ranks other than 0 return 0 and leave
        judgement to it.

    Raises:
        UserError: `folder` is a file, or `num_processes` is below 1.
    """
    require(num_processes >= 1, f"--processes must be at least 1, not {num_processes}.")
    measured = existing_folder(folder)
    job = current_job()
    if job is not None and job.rank != 0:
        failure = measure_bandwidth(job, num_processes).failure
        if failure is not None:
            sys.stderr.write(f"cola-train doctor: rank {job.rank}: {failure}\n")
        return 0

    def shown(section: _SectionT) -> _SectionT:
        # At once: if the next section hangs, as on a dead network disk, the user sees which.
        if not as_json:
            indented = [f"  {line}" for line in aligned(section.lines())]
            report("\n".join([type(section).__name__.lower(), *indented, ""]))
        return section

    facts = Facts(
        versions=shown(read_versions()),
        devices=shown(read_devices()),
        launcher=shown(read_launcher(job, num_processes)),
        bandwidth=shown(measure_bandwidth(job, num_processes)),
        disk=shown(measure_disk(measured)),
    )
    found = problems(facts)
    if as_json:
        every = {**asdict(facts), "problems": [asdict(problem) for problem in found]}
        report(json.dumps(every, indent=2))
    else:
        report("what is wrong")
        for line in map(str, found) if found else ["nothing"]:
            report(f"  {line}")
    return 1 if found else 0


def problems(facts: Facts) -> list[Problem]:
    """What is wrong, in the order of the report's sections."""
    return [
        *_in_software(facts.versions, facts.devices, facts.launcher),
        *_in_processes(facts.devices, facts.launcher),
        *_in_network(facts.launcher),
        *_in_bandwidth(facts.bandwidth),
        *_on_disk(facts.disk),
    ]


def _in_software(versions: Versions, devices: Devices, launcher: Launcher) -> Iterator[Problem]:
    for package, needed in versions.unmet:
        yield Problem("dependency", package, needed, "install cola_train again with pip")
    driver = versions.found.get("NVIDIA driver")
    if driver is not None and not devices.gpus:
        hidden = launcher.variables.get("CUDA_VISIBLE_DEVICES")
        if "CUDA" not in versions.found:
            found = f"torch {versions.found['torch']} beside NVIDIA driver {driver}"
            step = "install the one that pytorch.org names for this driver"
            yield Problem("torch without CUDA", found, "a torch built for CUDA", step)
        elif hidden not in ("", "-1"):
            found = f"NVIDIA driver {driver}, but torch sees no GPU"
            needed = f"a driver for CUDA {versions.found['CUDA']}"
            step = "update the driver, or see nvidia-smi"
            yield Problem("GPUs out of reach", found, needed, step)
    if datetime.fromisoformat(devices.clock) < _EARLIEST_CLOCK:
        step = "set the clock; times in logs and certificates depend on it"
        yield Problem("clock", devices.clock, "the present time", step)


def _in_processes(devices: Devices, launcher: Launcher) -> Iterator[Problem]:
    processes, cores, gpus = launcher.local_processes, devices.usable_cores, len(devices.gpus)
    if processes > cores:
        found = f"{processes} processes on {cores} usable cores"
        step = "start fewer processes, or give the job more cores"
        yield Problem("processes per core", found, "a core for each process", step)
    if gpus and processes > gpus:
        found = f"{processes} processes on {gpus} GPUs"
        step = "start as many processes as there are GPUs"
        yield Problem("processes per GPU", found, "a GPU for each process", step)
    name, threads, most = "OMP_NUM_THREADS", devices.omp_num_threads, max(1, cores // processes)
    step = f"export {name}={most}"
    if threads is None:
        if processes > 1:
            yield Problem(name, "not set", f"at most {most} with {processes} processes", step)
    elif threads.isdecimal() and cores >= processes and int(threads) * processes > cores:
        with_processes = f"with {processes} process{'es' * (processes > 1)}"
        found = f"{threads}, {with_processes} on {cores} usable cores"
        yield Problem(name, found, f"at most {most}", step)


def _in_network(launcher: Launcher) -> Iterator[Problem]:
    variables, names = launcher.variables, [interface.name for interface in launcher.interfaces]
    by_hand = launcher.started_by == "hand"
    if by_hand and "MASTER_ADDR" in variables and "RANK" not in variables:
        found = f"MASTER_ADDR is {variables['MASTER_ADDR']}, RANK is not set"
        step = "unset MASTER_ADDR, or start with torchrun"
        yield Problem("launcher", found, "both or neither", step)
    if by_hand and "SLURM_STEP_ID" in variables and int(variables.get("SLURM_NTASKS", "1")) > 1:
        found = f"one of {variables['SLURM_NTASKS']} tasks of srun, each of which trains alone"
        step = "let srun start torchrun, once a machine"
        yield Problem("launcher", found, "torchrun, which connects them", step)
    needed, step = f"one of {', '.join(names)}", "name an interface that is up"
    for interface in filter(None, variables.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if interface not in names:
            yield Problem("GLOO_SOCKET_IFNAME", interface, needed, step)
    chosen = variables.get("NCCL_SOCKET_IFNAME", "")
    # NCCL's own syntax: =exact names, ^excluded prefixes, or prefixes.
    wanted = tuple(filter(None, chosen.removeprefix("=").split(",")))
    if wanted and not chosen.startswith("^") and not any(name.startswith(wanted) for name in names):
        yield Problem("NCCL_SOCKET_IFNAME", chosen, needed, step)
    if "GLOO_SOCKET_IFNAME" in variables:
        return  # then nobody asks for the host's name
    host, needed = f"{launcher.hostname} resolves to", "an address of this machine"
    if not launcher.resolves_to:
        step = "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME"
        yield Problem("hostname", f"{host} nothing", needed, step)
    elif launcher.own_address is None:
        found = f"{host} {', '.join(launcher.resolves_to)}, not of this machine"
        yield Problem("hostname", found, needed, "correct /etc/hosts, or set GLOO_SOCKET_IFNAME")
    elif launcher.processes > launcher.local_processes and is_loopback(launcher.own_address):
        needed = "an address that other machines reach"
        step = "set GLOO_SOCKET_IFNAME to the interface between the machines, or correct /etc/hosts"
        yield Problem("hostname", f"{host} {launcher.own_address}", needed, step)


def _in_bandwidth(bandwidth: Bandwidth) -> Iterator[Problem]:
    if bandwidth.failure is not None:
        needed = f"{bandwidth.processes} processes that exchange tensors"
        variables = "GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"
        step = f"check {variables} and the firewall, or set NCCL_DEBUG=INFO"
        yield Problem("bandwidth", bandwidth.failure, needed, step)
    if len(bandwidth.torch_versions) > 1:
        counts = bandwidth.torch_versions.items()
        found = f"{', '.join(f'{version} in {count}' for version, count in counts)} processes"
        step = "install the same everywhere"
        yield Problem("versions of torch", found, "one version in the job", step)


def _on_disk(disk: Disk) -> Iterator[Problem]:
    other = "choose another --folder"
    if disk.failure is not None:
        yield Problem("folder", f"{disk.folder}: {disk.failure}", "one that can be written", other)
    if disk.free_bytes < FREE_GB * 1e9:
        found = f"{disk.free_bytes / 1e9:.1f} GB in {disk.folder}"
        yield Problem("free space", found, f"{FREE_GB} GB", f"free some, or {other}")
    if disk.rename_atomic is False:
        needed = "an old or a new file at every moment"
        yield Problem("rename", f"not atomic on {disk.file_system}", needed, other)
    if disk.flock is False:
        step = f"mount it with flock, or {other}"
        yield Problem("flock", f"fails on {disk.file_system}", "locks between processes", step)
    shared = disk.shared_memory_free_bytes
    if shared is not None and shared < SHARED_MEMORY_MB * 1e6:
        needed = f"{SHARED_MEMORY_MB} MB with data.num_workers above 0 or NCCL"
        step = "start the container with more (--shm-size), or remove what lies there"
        yield Problem("/dev/shm", f"{shared / 1e6:.0f} MB free", needed, step)
    if disk.open_files is not None and disk.open_files < OPEN_FILES:
        step = f"ulimit -n {OPEN_FILES}, or ask for more"
        yield Problem("open files", f"at most {disk.open_files}", str(OPEN_FILES), step)

"""The doctor's rules: from facts about a machine or job to a problem for each rule they break."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from cola_train.operations.bandwidth import Bandwidth
from cola_train.operations.disk import Disk
from cola_train.operations.job import Launcher, is_loopback
from cola_train.operations.machine import Devices, Versions

FREE_GB = 20
OPEN_FILES = 1024
SHARED_MEMORY_MB = 64
_EARLIEST_CLOCK = datetime(2024, 1, 1, tzinfo=UTC)


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

"""What is wrong: facts about a machine or job in, one finding for each rule that they break out."""

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
    """Something that will stop or slow a training: the rule, what was found, what is needed, and
    what to do.
    """

    rule: str
    found: str
    needed: str
    next_step: str

    def __str__(self) -> str:
        """One line of the report."""
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
            yield Problem(
                "torch without CUDA",
                f"torch {versions.found['torch']} beside NVIDIA driver {driver}",
                "a torch built for CUDA",
                "install the one that pytorch.org names for this driver",
            )
        elif hidden not in ("", "-1"):
            yield Problem(
                "GPUs out of reach",
                f"NVIDIA driver {driver}, but torch sees no GPU",
                f"a driver for CUDA {versions.found['CUDA']}",
                "update the driver, or see nvidia-smi",
            )
    if datetime.fromisoformat(devices.clock) < _EARLIEST_CLOCK:
        yield Problem(
            "clock",
            devices.clock,
            "the present time",
            "set the clock; times in logs and certificates depend on it",
        )


def _in_processes(devices: Devices, launcher: Launcher) -> Iterator[Problem]:
    processes, cores, gpus = launcher.local_processes, devices.usable_cores, len(devices.gpus)
    if processes > cores:
        yield Problem(
            "processes per core",
            f"{processes} processes on {cores} usable cores",
            "a core for each process",
            "start fewer processes, or give the job more cores",
        )
    if gpus and processes > gpus:
        yield Problem(
            "processes per GPU",
            f"{processes} processes on {gpus} GPUs",
            "a GPU for each process",
            "start as many processes as there are GPUs",
        )
    threads = devices.omp_num_threads
    if processes > 1 and threads is None:
        yield Problem(
            "OMP_NUM_THREADS",
            "not set",
            f"at most {max(1, cores // processes)} with {processes} processes",
            f"export OMP_NUM_THREADS={max(1, cores // processes)}",
        )
    elif (
        threads is not None
        and threads.isdecimal()
        and cores >= processes
        and int(threads) * processes > cores
    ):
        yield Problem(
            "OMP_NUM_THREADS",
            f"{threads}, with {processes} process{'es' * (processes > 1)} on {cores} usable cores",
            f"at most {cores // processes}",
            f"export OMP_NUM_THREADS={cores // processes}",
        )


def _in_network(launcher: Launcher) -> Iterator[Problem]:
    variables, names = launcher.variables, [interface.name for interface in launcher.interfaces]
    by_hand, several_machines = (
        launcher.started_by == "hand",
        launcher.processes > launcher.local_processes,
    )
    if by_hand and "MASTER_ADDR" in variables and "RANK" not in variables:
        yield Problem(
            "launcher",
            f"MASTER_ADDR is {variables['MASTER_ADDR']}, RANK is not set",
            "both or neither",
            "unset MASTER_ADDR, or start with torchrun",
        )
    if by_hand and "SLURM_STEP_ID" in variables and int(variables.get("SLURM_NTASKS", "1")) > 1:
        yield Problem(
            "launcher",
            f"one of {variables['SLURM_NTASKS']} tasks of srun, each of which trains alone",
            "torchrun, which connects them",
            "let srun start torchrun, once a machine",
        )
    for interface in filter(None, variables.get("GLOO_SOCKET_IFNAME", "").split(",")):
        if interface not in names:
            yield Problem(
                "GLOO_SOCKET_IFNAME",
                interface,
                f"one of {', '.join(names)}",
                "name an interface that is up",
            )
    chosen = variables.get("NCCL_SOCKET_IFNAME", "")
    # NCCL's own syntax: =exact names, ^excluded prefixes, or prefixes.
    wanted = (
        []
        if chosen.startswith("^")
        else [name for name in chosen.removeprefix("=").split(",") if name]
    )
    if wanted and not any(name.startswith(tuple(wanted)) for name in names):
        yield Problem(
            "NCCL_SOCKET_IFNAME",
            chosen,
            f"one of {', '.join(names)}",
            "name an interface that is up",
        )
    if "GLOO_SOCKET_IFNAME" in variables:
        return  # then nobody asks for the host's name
    if not launcher.resolves_to:
        yield Problem(
            "hostname",
            f"{launcher.hostname} resolves to nothing",
            "an address of this machine",
            "add it to /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    elif launcher.own_address is None:
        yield Problem(
            "hostname",
            f"{launcher.hostname} resolves to {', '.join(launcher.resolves_to)}, not of this "
            "machine",
            "an address of this machine",
            "correct /etc/hosts, or set GLOO_SOCKET_IFNAME",
        )
    elif several_machines and is_loopback(launcher.own_address):
        yield Problem(
            "hostname",
            f"{launcher.hostname} resolves to {launcher.own_address}",
            "an address that other machines reach",
            "set GLOO_SOCKET_IFNAME to the interface between the machines, or correct /etc/hosts",
        )


def _in_bandwidth(bandwidth: Bandwidth) -> Iterator[Problem]:
    if bandwidth.failure is not None:
        yield Problem(
            "bandwidth",
            bandwidth.failure,
            f"{bandwidth.processes} processes that exchange tensors",
            "check GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME and the firewall, or set NCCL_DEBUG=INFO",
        )
    if len(bandwidth.torch_versions) > 1:
        versions = ", ".join(
            f"{version} in {count}" for version, count in bandwidth.torch_versions.items()
        )
        yield Problem(
            "versions of torch",
            f"{versions} processes",
            "one version in the job",
            "install the same everywhere",
        )


def _on_disk(disk: Disk) -> Iterator[Problem]:
    other = "choose another --folder"
    if disk.failure is not None:
        yield Problem("folder", f"{disk.folder}: {disk.failure}", "one that can be written", other)
    if disk.free_bytes < FREE_GB * 1e9:
        yield Problem(
            "free space",
            f"{disk.free_bytes / 1e9:.1f} GB in {disk.folder}",
            f"{FREE_GB} GB",
            f"free some, or {other}",
        )
    if disk.rename_atomic is False:
        yield Problem(
            "rename",
            f"not atomic on {disk.file_system}",
            "an old or a new file at every moment",
            other,
        )
    if disk.flock is False:
        yield Problem(
            "flock",
            f"fails on {disk.file_system}",
            "locks between processes",
            f"mount it with flock, or {other}",
        )
    shared = disk.shared_memory_free_bytes
    if shared is not None and shared < SHARED_MEMORY_MB * 1e6:
        yield Problem(
            "/dev/shm",
            f"{shared / 1e6:.0f} MB free",
            f"{SHARED_MEMORY_MB} MB with data.num_workers above 0 or NCCL",
            "start the container with more (--shm-size), or remove what lies there",
        )
    if disk.open_files is not None and disk.open_files < OPEN_FILES:
        yield Problem(
            "open files",
            f"at most {disk.open_files}",
            str(OPEN_FILES),
            f"ulimit -n {OPEN_FILES}, or ask for more",
        )

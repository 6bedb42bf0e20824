"""How this process was started, and how other processes reach this machine over the network."""

import ipaddress
import os
import socket
from dataclasses import dataclass

import psutil
import torch.distributed as dist

_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_NNODES",
    "SLURM_NODELIST",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
)
_PREFIXES = ("GLOO_", "NCCL_", "TORCH_NCCL_")


@dataclass(frozen=True)
class TorchrunJob:
    """The processes that torchrun started, this one among them."""

    rank: int  # of this process
    processes: int
    local_processes: int  # on this machine


@dataclass(frozen=True)
class Interface:
    """A network interface that is up; `megabits` per second, 0 where the system does not say."""

    name: str
    addresses: tuple[str, ...]
    megabits: int


@dataclass(frozen=True)
class Launcher:
    """The launcher's variables and the network."""

    started_by: str  # "torchrun" or "hand"
    processes: int
    local_processes: int
    variables: dict[str, str]
    interfaces: tuple[Interface, ...]
    hostname: str
    resolves_to: tuple[str, ...]  # the addresses of the host's own name
    own_address: str | None  # the first of these that belongs to this machine
    gloo_interface: str | None  # GLOO_SOCKET_IFNAME, or else the interface of own_address

    def lines(self) -> list[tuple[str, str]]:
        interfaces = [
            f"{found.name} {found.addresses[0]}"
            + (f" ({found.megabits / 1000:g} Gbit/s)" if found.megabits else "")
            for found in self.interfaces
        ]
        addresses = ", ".join(self.resolves_to) or "nothing"
        nccl = "what it chooses; NCCL_SOCKET_IFNAME is not set"
        return [
            ("started by", self.started_by),
            ("processes", f"{self.processes}, on this machine {self.local_processes}"),
            *self.variables.items(),
            ("interfaces", ", ".join(interfaces) or "none"),
            ("gloo uses", self.gloo_interface or "loopback, for want of another"),
            ("NCCL uses", self.variables.get("NCCL_SOCKET_IFNAME", nccl)),
            ("hostname", f"{self.hostname}, resolves to {addresses}"),
        ]


def current_job() -> TorchrunJob | None:
    """The job that this process is part of; None if torchrun did not start it."""
    if not dist.is_torchelastic_launched():
        return None
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return TorchrunJob(*(int(os.environ[name]) for name in names))


def read_launcher(job: TorchrunJob | None, num_processes: int) -> Launcher:
    """The launcher's variables, and the addresses of the host's name, perhaps of a name server.

    `num_processes`: how many a process started by hand would start itself.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith(_PREFIXES)
    }
    interfaces, hostname = _interfaces(), socket.gethostname()
    resolves_to = _addresses(hostname)
    own_address = next(filter(_is_own, resolves_to), None)
    named = (found.name for found in interfaces if own_address in found.addresses)
    loopback = "loopback" if own_address is not None and is_loopback(own_address) else None
    return Launcher(
        started_by="torchrun" if job else "hand",
        processes=job.processes if job else num_processes,
        local_processes=job.local_processes if job else num_processes,
        variables=dict(sorted(variables.items())),
        interfaces=interfaces,
        hostname=hostname,
        resolves_to=resolves_to,
        own_address=own_address,
        gloo_interface=variables.get("GLOO_SOCKET_IFNAME") or next(named, loopback),
    )


def is_loopback(address: str) -> bool:
    """Whether an address means the machine itself, so that no other machine can use it."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _interfaces() -> tuple[Interface, ...]:
    status, families = psutil.net_if_stats(), (socket.AF_INET, socket.AF_INET6)
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        reachable = tuple(a.address for a in addresses if a.family in families)
        if name in status and status[name].isup and reachable:
            found.append(Interface(name, reachable, status[name].speed))
    return tuple(found)


def _addresses(hostname: str) -> tuple[str, ...]:
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except OSError:
        return ()
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


def _is_own(address: str) -> bool:
    # By binding, as gloo does: not every loopback address is listed with its interface (127.0.1.1).
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True

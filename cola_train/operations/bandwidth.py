"""The bandwidth between processes, measured by workers that may crash or hang without harm.

Run as a program, this module is one worker: its argument is its parent's process id, its place is
in torchrun's variables.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from cola_train.json_text import parse_json
from cola_train.operations.job import TorchrunJob

_COLLECTIVES, _MEGABYTES = ("all-reduce", "all-gather"), (1, 64)
_REPETITIONS = 5
# As many collectives as fit in this time: neither the clock's resolution nor the start counts.
_REPETITION_S = 0.02
# Below half of the next: torch tries twice to connect, and a worker that ends by itself says why.
_CALL_TIMEOUT_S = 45.0
_WORKERS_TIMEOUT_S = 120.0
_RESULT = "cola_train bandwidth: "


@dataclass(frozen=True)
class Rate:
    """The bus bandwidth in GB/s of one collective for a message of `megabytes`."""

    collective: str
    megabytes: int
    gb_per_s: float


@dataclass(frozen=True)
class Bandwidth:
    """Rates between `processes` on `hosts` machines.

    `rates` is empty if there was only one process, or if the measurement failed; `failure` is then
    the reason.
    """

    processes: int
    hosts: int
    device: str
    rates: tuple[Rate, ...]
    torch_versions: dict[str, int]  # version -> number of processes with it
    failure: str | None

    def lines(self) -> list[tuple[str, str]]:
        if not self.rates:
            alone = "one process exchanges nothing; give --processes N, or start it with torchrun"
            return [("not measured", alone if self.failure is None else self.failure)]
        machines = f"{self.hosts} machine{'s' * (self.hosts > 1)}"
        return [
            ("between", f"{self.processes} processes on {machines}, {self.device}"),
            *(
                (f"{rate.collective} {rate.megabytes} MB", f"{rate.gb_per_s:.3g} GB/s")
                for rate in self.rates
            ),
        ]


def measure_bandwidth(
    job: TorchrunJob | None, num_processes: int, timeout_s: float = _WORKERS_TIMEOUT_S
) -> Bandwidth:
    """Measure over `job`'s ranks, each of which must call this, or over `num_processes` here.

    Bus bandwidth is bytes / seconds x 2 (n - 1) / n for all-reduce and x (n - 1) / n for
    all-gather, for n processes and a message of that many bytes (for all-gather the gathered one).
    It is what each process must at least send and receive, so it compares with the speed of the
    link for any n. It is the median of several repetitions, each as slow as its slowest process.

    Only rank 0 gets rates. A failure, or no end within `timeout_s` seconds, is a result with
    `failure`, not an exception.
    """
    nothing = Bandwidth(job.processes if job else num_processes, 1, "none", (), {}, None)
    if nothing.processes == 1:
        return nothing
    try:
        if job:
            output = _run_workers([{}], job.rank, timeout_s)
        else:
            output = _run_local_workers(num_processes, timeout_s)
    except (OSError, RuntimeError) as error:
        return replace(nothing, failure=str(error))
    for line in output.splitlines():
        if line.startswith(_RESULT):
            result = parse_json(line.removeprefix(_RESULT))
            result["rates"] = tuple(Rate(*rate) for rate in result["rates"])
            return Bandwidth(**result, failure=None)
    return nothing


def _run_local_workers(number: int, timeout_s: float) -> str:
    # Workers meet at this store rather than at one of rank 0's, for which a port free now might be
    # taken later.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # public all the same
    job = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
    }
    places = [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    return _run_workers(places, 0, timeout_s)


def _run_workers(places: list[dict[str, str]], first_rank: int, timeout_s: float) -> str:
    """The first worker's output, once all are done. Each has the environment of one of `places`."""
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    workers: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            finished = []
            for rank, place in enumerate(places, start=first_rank):
                environment, pipe = {**os.environ, **place}, subprocess.PIPE
                workers.append(
                    subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
                )
                finished.append(pool.submit(_finish, workers[-1], rank, timeout_s))
            # Once one has failed, the others wait for it in vain.
            done, _ = wait(finished, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return finished[0].result()
        finally:
            # Inside the pool, which ends only when its threads' workers have.
            for worker in workers:
                worker.kill()


def _finish(worker: "subprocess.Popen[str]", rank: int, timeout_s: float) -> str:
    try:
        output, errors = worker.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.communicate()
        message = f"the worker of rank {rank} was not done after {timeout_s:g} s"
        raise RuntimeError(message) from None
    if worker.returncode != 0:
        last = (errors.strip().splitlines() or ["it wrote nothing"])[-1]
        raise RuntimeError(
            f"the worker of rank {rank} ended with status {worker.returncode}: {last[:300]}"
        )
    return output


def _measure() -> dict[str, Any]:
    """In a worker: the fields of `Bandwidth`, the same on every rank."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=_CALL_TIMEOUT_S))
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (socket.gethostname(), torch.__version__))
    return {
        "processes": len(ranks),
        "hosts": len({host for host, _ in ranks}),
        "device": "NCCL on GPUs" if device.type == "cuda" else "gloo on CPUs",
        "rates": [
            (name, megabytes, _bus_bandwidth(name, megabytes, device))
            for name in _COLLECTIVES
            for megabytes in _MEGABYTES
        ],
        "torch_versions": dict(Counter(str(version) for _, version in ranks)),
    }


def _bus_bandwidth(collective: str, megabytes: int, device: torch.device) -> float:
    world = dist.get_world_size()
    part = torch.zeros(megabytes * 1_000_000 // (4 * world), device=device)
    whole = torch.zeros(part.numel() * world, device=device)

    def seconds(calls: int) -> float:
        # A common start and the slowest rank's time, both over gloo: it disturbs nothing on GPUs.
        dist.all_reduce(torch.zeros(1))
        start = time.perf_counter()
        for _ in range(calls):
            if collective == "all-reduce":
                dist.all_reduce(whole)
            else:
                dist.all_gather_into_tensor(whole, part)
        if device.type == "cuda":
            torch.cuda.synchronize()
        slowest = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item() / calls

    seconds(1)  # connects the ranks
    calls = max(1, min(100, int(_REPETITION_S / seconds(1))))
    median = torch.tensor([seconds(calls) for _ in range(_REPETITIONS)]).median().item()
    transfers = 2 if collective == "all-reduce" else 1
    return whole.numel() * 4 / 1e9 / median * transfers * (world - 1) / world


def _end_with_parent(parent: int) -> None:
    # A parent that is killed cannot end its workers, which may wait for each other for long.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work() -> NoReturn:
    """Run as one worker; rank 0 writes the result to stdout."""
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    status = 1
    try:
        result = _measure()
        if dist.get_rank() == 0:
            sys.stdout.write(f"\n{_RESULT}{json.dumps(result)}\n")
        sys.stdout.flush()
        dist.barrier()
        status = 0
    except Exception as error:
        # torch appends its own stack to some messages.
        text = " ".join(str(error).split()).partition(" Exception raised from")[0]
        sys.stderr.write(f"\n{type(error).__name__}: {text}\n")
    sys.stderr.flush()
    # Taking gloo's process group down may abort a process after all is done.
    os._exit(status)


if __name__ == "__main__":
    _work()

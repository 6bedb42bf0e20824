"""How fast processes exchange tensors: all-reduce and all-gather, measured by workers that may
crash or hang without harm.

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

from cola_train.operations.job import Job

SMALL_MB, LARGE_MB = 1, 64
_COLLECTIVES = ("all-reduce", "all-gather")
_REPETITIONS = 5
# A repetition is as many collectives as fit in this time, so that neither the clock nor the start
# counts.
_REPETITION_S = 0.02
# Half of the next and less: torch tries twice to connect, and a worker that ends by itself says
# why.
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

    `rates` is empty if there was only one process, or if the measurement failed, for which
    `failure` then gives the reason. `torch_versions` are those of all processes, with the number of
    processes.
    """

    processes: int
    hosts: int
    device: str
    rates: tuple[Rate, ...]
    torch_versions: dict[str, int]
    failure: str | None

    def lines(self) -> list[tuple[str, str]]:
        """Name and text of each line of the report."""
        if self.failure is not None:
            return [("not measured", self.failure)]
        if not self.rates:
            return [
                (
                    "not measured",
                    "one process exchanges nothing; give --processes N, or start it with torchrun",
                )
            ]
        return [
            (
                "between",
                (
                    f"{self.processes} processes on {self.hosts} machine{'s' * (self.hosts > 1)}, "
                    f"{self.device}"
                ),
            ),
            *(
                (f"{rate.collective} {rate.megabytes} MB", f"{rate.gb_per_s:.3g} GB/s")
                for rate in self.rates
            ),
        ]


class _WorkerError(Exception):
    """A worker failed; the message says how."""


def measure_bandwidth(
    job: Job | None, num_processes: int, timeout_s: float = _WORKERS_TIMEOUT_S
) -> Bandwidth:
    """Measure over the ranks of `job`, each of which must call this; without a job, over
    `num_processes` on this machine.

    Bus bandwidth is bytes / seconds x 2 (n - 1) / n for all-reduce and x (n - 1) / n for
    all-gather, for n processes and a message of that many bytes, for all-gather the gathered one.
    It is what each process must at least send and receive, so it compares with the speed of the
    link whatever n is. It is the median of several repetitions, each as slow as its slowest
    process.

    Only rank 0 gets rates. A failure, or no end within `timeout_s` seconds, is a result with
    `failure`, not an exception.
    """
    processes = job.processes if job else num_processes
    nothing = Bandwidth(processes, 1, "none", (), {}, None)
    if processes == 1:
        return nothing
    try:
        output = (
            _run_workers([{}], job.rank, timeout_s)
            if job
            else _run_local_workers(num_processes, timeout_s)
        )
    except (_WorkerError, OSError, RuntimeError) as error:
        return replace(nothing, failure=str(error))
    results = [
        line.removeprefix(_RESULT) for line in output.splitlines() if line.startswith(_RESULT)
    ]
    if not results:
        return nothing
    result = json.loads(results[0])
    return Bandwidth(
        **{**result, "rates": tuple(Rate(**rate) for rate in result["rates"])}, failure=None
    )


def _run_local_workers(number: int, timeout_s: float) -> str:
    # Workers meet at this store rather than at one of rank 0's, for which a port free now might be
    # taken later.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # public all the same
    job = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    job |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    return _run_workers(
        [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)],
        0,
        timeout_s,
    )


def _run_workers(places: list[dict[str, str]], first_rank: int, timeout_s: float) -> str:
    """What the first worker wrote, once all are done; each gets one of `places`, environment
    variables. None is left behind.
    """
    command = [sys.executable, "-m", __name__, str(os.getpid())]
    workers: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(len(places)) as pool:
        try:
            for place in places:
                environment = {**os.environ, **place}
                workers.append(
                    subprocess.Popen(
                        command,
                        env=environment,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            finished = [
                pool.submit(_finish, worker, first_rank + index, timeout_s)
                for index, worker in enumerate(workers)
            ]
            # Once one has failed the others wait for it in vain.
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
        raise _WorkerError(
            f"the worker of rank {rank} was not done after {timeout_s:g} s"
        ) from None
    if worker.returncode != 0:
        last = (errors.strip().splitlines() or ["it wrote nothing"])[-1]
        raise _WorkerError(
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
    rates = [
        (name, size, _bus_bandwidth(name, size, device))
        for name in _COLLECTIVES
        for size in (SMALL_MB, LARGE_MB)
    ]
    return {
        "processes": len(ranks),
        "hosts": len({host for host, _ in ranks}),
        "device": "NCCL on GPUs" if device.type == "cuda" else "gloo on CPUs",
        "rates": [
            {"collective": name, "megabytes": size, "gb_per_s": rate} for name, size, rate in rates
        ],
        "torch_versions": dict(Counter(str(version) for _, version in ranks)),
    }


def _bus_bandwidth(collective: str, megabytes: int, device: torch.device) -> float:
    world = dist.get_world_size()
    part = torch.zeros(megabytes * 1_000_000 // (4 * world), device=device)
    whole = torch.zeros(part.numel() * world, device=device)

    def seconds(calls: int) -> float:
        # A start in common and the slowest rank's time, both over gloo: on GPUs they then disturb
        # nothing that is measured.
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
    # A parent killed outright tells nobody, and its workers may wait for each other for long.
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work() -> NoReturn:
    """Be one worker; rank 0 writes the result to stdout."""
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

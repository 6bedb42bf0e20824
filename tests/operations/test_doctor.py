"""The doctor: findings from made-up facts, real measurements, and failures that become findings
rather than crashes.
"""

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import psutil
import pytest
import torch
import torch.distributed as dist

from cola_train.config.settings import UserError
from cola_train.operations import bandwidth, disk, job
from cola_train.operations.bandwidth import Bandwidth, measure_bandwidth
from cola_train.operations.disk import Disk, measure_disk
from cola_train.operations.doctor import Facts, doctor, problems
from cola_train.operations.job import Interface, Launcher, TorchrunJob
from cola_train.operations.machine import Devices, Gpu, Versions
from tests.helpers.programs import clean_environment

GPU = Gpu("H100", 80_000_000_000, "9.0", True)
HEALTHY = Facts(
    Versions({"torch": "2.13.0+cu130", "CUDA": "13.0", "NVIDIA driver": "580.1"}, ()),
    Devices(
        "a CPU",
        16,
        16,
        10**11,
        10**11,
        "4",
        4,
        True,
        (GPU, GPU),
        ((0, 1), (1, 0)),
        "2026-01-02T03:04:05+00:00",
    ),
    Launcher(
        "torchrun",
        4,
        2,
        {"MASTER_ADDR": "a", "RANK": "0"},
        (Interface("eth0", ("10.0.0.1",), 10_000),),
        "a",
        ("10.0.0.1",),
        "10.0.0.1",
        "eth0",
    ),
    Bandwidth(4, 2, "NCCL on GPUs", (), {"2.13.0": 4}, None),
    Disk("/runs", "ext4", 10**12, 10**11, None, 256, 1.0, 2.0, True, True, 10**9, 10**9, 4096),
)


@pytest.fixture(autouse=True)
def started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name in job._VARIABLES or name.startswith(job._PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def report(
    capsys: pytest.CaptureFixture[str], folder: Path, processes: int
) -> tuple[int, dict[str, Any]]:
    status = doctor(folder, processes, as_json=True)
    return status, json.loads(capsys.readouterr().out)


def test_healthy_facts_have_nothing_wrong() -> None:
    assert problems(HEALTHY) == []


@pytest.mark.parametrize(
    "section, changes, line",
    [
        (
            "versions",
            {"unmet": (("torch 2.9.1", ">=2.10"),)},
            "dependency: torch 2.9.1; needed: >=2.10; next: install",
        ),
        (
            "devices",
            {"gpus": ()},
            (
                "GPUs out of reach: NVIDIA driver 580.1, but torch sees no GPU; needed: a driver "
                "for CUDA 13.0"
            ),
        ),
        (
            "devices",
            {"clock": "1970-01-01T00:00:00+00:00"},
            "clock: 1970-01-01T00:00:00+00:00; needed: the present time",
        ),
        (
            "devices",
            {"usable_cores": 1},
            "processes per core: 2 processes on 1 usable cores; needed: a core for each process",
        ),
        ("devices", {"gpus": (GPU,)}, "processes per GPU: 2 processes on 1 GPUs"),
        (
            "devices",
            {"omp_num_threads": None},
            "OMP_NUM_THREADS: not set; needed: at most 8 with 2 processes",
        ),
        (
            "devices",
            {"omp_num_threads": "9"},
            "OMP_NUM_THREADS: 9, with 2 processes on 16 usable cores; needed: at most 8",
        ),
        (
            "launcher",
            {"started_by": "hand", "variables": {"MASTER_ADDR": "a"}},
            "launcher: MASTER_ADDR is a, RANK is not set",
        ),
        (
            "launcher",
            {"started_by": "hand", "variables": {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "8"}},
            "launcher: one of 8 tasks",
        ),
        (
            "launcher",
            {"variables": {"GLOO_SOCKET_IFNAME": "ib0"}},
            "GLOO_SOCKET_IFNAME: ib0; needed: one of eth0",
        ),
        (
            "launcher",
            {"variables": {"NCCL_SOCKET_IFNAME": "ib,mlx"}},
            "NCCL_SOCKET_IFNAME: ib,mlx; needed: one of eth0",
        ),
        ("launcher", {"resolves_to": (), "own_address": None}, "hostname: a resolves to nothing"),
        (
            "launcher",
            {"own_address": None},
            "hostname: a resolves to 10.0.0.1, not of this machine",
        ),
        (
            "launcher",
            {"own_address": "127.0.1.1"},
            "hostname: a resolves to 127.0.1.1; needed: an address that other machines",
        ),
        (
            "bandwidth",
            {"failure": "no answer"},
            "bandwidth: no answer; needed: 4 processes that exchange tensors",
        ),
        (
            "bandwidth",
            {"torch_versions": {"2.12": 1, "2.13": 3}},
            "versions of torch: 2.12 in 1, 2.13 in 3 processes",
        ),
        (
            "disk",
            {"failure": "Read-only file system"},
            "folder: /runs: Read-only file system; needed: one that can be written",
        ),
        ("disk", {"free_bytes": 19_900_000_000}, "free space: 19.9 GB in /runs; needed: 20 GB"),
        ("disk", {"rename_atomic": False}, "rename: not atomic on ext4"),
        ("disk", {"flock": False}, "flock: fails on ext4"),
        ("disk", {"shared_memory_free_bytes": 63_000_000}, "/dev/shm: 63 MB free; needed: 64 MB"),
        ("disk", {"open_files": 1023}, "open files: at most 1023; needed: 1024"),
    ],
)
def test_each_rule_finds_what_breaks_it(section: str, changes: dict[str, Any], line: str) -> None:
    facts = replace(HEALTHY, **{section: replace(getattr(HEALTHY, section), **changes)})
    found = [str(problem) for problem in problems(facts)]
    assert len(found) == 1
    assert found[0].startswith(line)


def test_a_driver_beside_a_torch_without_cuda_is_wrong() -> None:
    versions = Versions({"torch": "2.13.0+cpu", "NVIDIA driver": "580.1"}, ())
    found = problems(replace(HEALTHY, versions=versions, devices=replace(HEALTHY.devices, gpus=())))
    assert [problem.rule for problem in found] == ["torch without CUDA"]


@pytest.mark.parametrize(
    "section, changes",
    [
        (
            "disk",
            {
                "open_files": None,
                "shared_memory_bytes": None,
                "shared_memory_free_bytes": None,
                "flock": None,
            },
        ),
        ("launcher", {"variables": {"NCCL_SOCKET_IFNAME": "^ib"}}),
        ("launcher", {"variables": {"NCCL_SOCKET_IFNAME": "=eth0"}}),
        (
            "launcher",
            {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}, "resolves_to": (), "own_address": None},
        ),
        ("launcher", {"processes": 2, "own_address": "127.0.1.1"}),
        ("launcher", {"started_by": "hand", "variables": {"SLURM_NTASKS": "8"}}),
        ("devices", {"omp_num_threads": "4,2"}),
    ],
)
def test_what_is_allowed_is_not_a_finding(section: str, changes: dict[str, Any]) -> None:
    assert (
        problems(replace(HEALTHY, **{section: replace(getattr(HEALTHY, section), **changes)})) == []
    )


def test_hidden_gpus_are_not_a_finding() -> None:
    hidden = replace(HEALTHY.launcher, variables={"CUDA_VISIBLE_DEVICES": ""})
    assert (
        problems(replace(HEALTHY, launcher=hidden, devices=replace(HEALTHY.devices, gpus=()))) == []
    )


def test_two_processes_are_measured_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = report(capsys, tmp_path / "not" / "there", 2)
    assert list(found) == ["versions", "devices", "launcher", "bandwidth", "disk", "problems"]
    assert status == (1 if found["problems"] else 0)
    assert "bandwidth" not in [problem["rule"] for problem in found["problems"]]
    rates = {
        (rate["collective"], rate["megabytes"]): rate["gb_per_s"]
        for rate in found["bandwidth"]["rates"]
    }
    assert set(rates) == {
        ("all-reduce", 1),
        ("all-reduce", 64),
        ("all-gather", 1),
        ("all-gather", 64),
    }
    assert all(0 < rate < math.inf for rate in rates.values())
    assert found["bandwidth"]["torch_versions"] == {torch.__version__: 2}
    assert found["disk"]["folder"] == str(tmp_path)
    assert found["disk"]["write_gb_per_s"] > 0
    assert found["disk"]["read_gb_per_s"] > 0
    assert found["disk"]["rename_atomic"] is found["disk"]["flock"] is True
    assert list(tmp_path.iterdir()) == []


def test_the_text_has_every_section_and_says_what_was_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor(tmp_path, 1, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert titles == ["versions", "devices", "launcher", "bandwidth", "disk", "what is wrong"]
    assert (
        "  not measured  one process exchanges nothing; give --processes N, or start it with "
        "torchrun" in lines
    )
    assert f"  torch        {torch.__version__}" in lines


def test_under_torchrun_the_jobs_ranks_are_measured_and_one_reports(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom cola_train.operations.doctor import "
        "doctor\ndoctor(pathlib.Path(sys.argv[1]), 1, True)\n"
    )
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", *launch, str(tmp_path / "program.py"), str(tmp_path)],
        env={**clean_environment(), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)  # two reports would not parse
    assert (found["launcher"]["started_by"], found["launcher"]["local_processes"]) == (
        "torchrun",
        2,
    )
    assert found["bandwidth"]["failure"] is None
    assert len(found["bandwidth"]["rates"]) == 4


def test_gpus_are_listed_with_the_pairs_that_reach_each_other() -> None:
    lines = dict(replace(HEALTHY.devices, peers=((0, 1),)).lines())
    assert lines["GPU 1"] == "H100, 80.0 GB, compute capability 9.0, bf16"
    assert lines["P2P"] == "1 of 2 pairs of GPUs"
    assert "P2P" not in dict(replace(HEALTHY.devices, gpus=()).lines())


@pytest.mark.parametrize("collective, expected", [("all-reduce", 2 * 3 / 4), ("all-gather", 3 / 4)])
def test_bus_bandwidth_is_bytes_per_second_that_each_process_moves(
    collective: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four processes and a link on which 1 MB takes 1 ms.
    clock = SimpleNamespace(now=0.0)

    def move(*tensors: Any) -> None:
        clock.now += tensors[0].numel() * 4 / 1e9 if tensors[0].numel() > 1 else 0.0

    monkeypatch.setattr(bandwidth, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    for name, fake in (
        ("get_world_size", lambda: 4),
        ("all_reduce", move),
        ("all_gather_into_tensor", move),
    ):
        monkeypatch.setattr(dist, name, fake)
    assert bandwidth._bus_bandwidth(collective, 1, torch.device("cpu")) == pytest.approx(expected)


def test_a_worker_that_fails_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    status, found = report(capsys, tmp_path, 2)
    assert status == 1
    lines = {problem["rule"]: problem["found"] for problem in found["problems"]}
    assert lines["GLOO_SOCKET_IFNAME"] == "nosuch0"
    assert "ended with status 1" in lines["bandwidth"]
    assert "nosuch0" in lines["bandwidth"]


def test_a_worker_that_hangs_is_a_finding_and_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    # The second rank of two, whose first never comes.
    place = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    before = psutil.Process().children()
    found = measure_bandwidth(TorchrunJob(1, 2, 2), 1, timeout_s=0.5)
    assert found.failure == "the worker of rank 1 was not done after 0.5 s"
    assert psutil.Process().children() == before


def test_what_the_user_gave_wrong_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"--folder must be a folder, or one that can be made; .*file is a file"
    ):
        doctor(tmp_path / "file", 1, False)
    with pytest.raises(UserError, match="--processes must be at least 1, not 0"):
        doctor(tmp_path, 0, False)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs a folder that nobody may write to"
)
def test_a_folder_that_cannot_be_written_is_a_finding(capsys: pytest.CaptureFixture[str]) -> None:
    status, found = report(capsys, Path("/proc/runs"), 1)
    assert status == 1
    assert found["disk"]["file_system"] == "proc"
    assert "folder" in [problem["rule"] for problem in found["problems"]]


def raises(number: int) -> Callable[..., NoReturn]:
    def fail(*_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_disk_that_fails_midway_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raises(errno.EIO))
    found = measure_disk(tmp_path)
    assert found.failure == os.strerror(errno.EIO)
    assert found.write_gb_per_s is None
    assert list(tmp_path.iterdir()) == []


def test_little_space_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=100_000_000)
    )
    assert measure_disk(tmp_path).measured_bytes <= 25_000_000
    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000)
    )
    assert measure_disk(tmp_path).write_gb_per_s is None


def test_promises_that_a_disk_breaks_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove_then_rename(source: Path, target: Path) -> None:
        target.unlink()
        os.sched_yield()
        source.rename(target)

    monkeypatch.setattr(disk, "_LARGEST", 1)
    monkeypatch.setattr(Path, "replace", remove_then_rename)
    monkeypatch.setattr(fcntl, "flock", raises(errno.ENOLCK))
    found = measure_disk(tmp_path)
    assert (found.rename_atomic, found.flock) == (False, False)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)  # a lock that two may hold
    assert measure_disk(tmp_path).flock is False


def test_the_file_system_is_what_df_says(tmp_path: Path) -> None:
    done = subprocess.run(
        ["df", "--output=fstype", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("this df cannot name the file system")
    assert disk._file_system(tmp_path) == done.stdout.split()[-1]

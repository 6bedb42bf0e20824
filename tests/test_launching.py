"""The launch scripts say what torchrun is to do, the guide's commands are ones they take, two hosts
train as one process does.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.run import config_from_args, parse_args

from cola_train.cli import main
from cola_train.config.load import load_config, to_yaml
from cola_train.families.cola.config import JointRunConfig, VAERunConfig
from cola_train.processes import STORE
from cola_train.programs import ENDING
from cola_train.training.loop import interrupts
from tests.helpers.programs import ROOT, clean_environment, cola_train
from tests.helpers.runs import figures

LAUNCH, SBATCH = "scripts/launch_torchrun.sh", "scripts/slurm.sbatch"
TRAINING = ["joint", "configs/paper/joint.yaml"]
GUIDE = (ROOT / "docs/launching.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)
    for line in block.splitlines()
]
# What the head of the script lists: one name and its meaning a line, or several names.
SETTINGS = set(
    re.findall(
        r"\b[A-Z_]{5,}\b(?=  |, [A-Z])",
        "\n".join(re.findall(r"^#   .*", (ROOT / LAUNCH).read_text(), re.M)),
    )
)


def shell(*command: str, folder: Path = ROOT, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run in an environment of nothing but `settings`."""
    environment = {"PATH": clean_environment()["PATH"], **settings}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def dry_run(*arguments: str, **settings: str) -> tuple[dict[str, str], argparse.Namespace]:
    done = shell("bash", LAUNCH, "--dry-run", *arguments, **{"NPROC_PER_NODE": "8", **settings})
    assert done.returncode == 0, done.stderr
    return parsed(done.stdout)


def parsed(printed: str) -> tuple[dict[str, str], argparse.Namespace]:
    """Environment and options of a printed command; torchrun's own parser refuses options that it
    does not have.
    """
    (line,) = printed.splitlines()
    words = shlex.split(line)
    place = words.index("torchrun")
    assert words[0] == "env"
    return dict(word.split("=", 1) for word in words[1:place]), parse_args(words[place + 1 :])


def assert_fits(arguments: list[str], processes: int) -> None:
    """The arguments are a training that loads and whose batch can be spread over `processes`."""
    verb, path, *overrides = arguments
    config = load_config(
        {"vae": VAERunConfig, "joint": JointRunConfig}[verb], ROOT / path, overrides
    )
    assert config.trainer.global_batch_size % (config.trainer.micro_batch_size * processes) == 0


@pytest.mark.parametrize("script", [LAUNCH, SBATCH])
def test_the_scripts_are_sound_bash(script: str) -> None:
    done = shell("bash", "-n", script)
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck") is None:
        pytest.skip("no program `shellcheck`: only the syntax was checked")
    done = shell("shellcheck", script)
    assert done.returncode == 0, done.stdout


def test_one_machine_by_default() -> None:
    arguments = ["joint", "configs/a b.yaml", "corpus=['x', \"y\"]", "name=$HOME\\x"]
    done = shell("bash", LAUNCH, "--dry-run", *arguments)
    environment, options = parsed(done.stdout)
    assert environment == {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[${rank}] ",
    }
    assert (options.nnodes, options.nproc_per_node) == ("1", str(max(1, torch.cuda.device_count())))
    assert (options.standalone, options.local_addr, options.max_restarts) == (True, "127.0.0.1", 0)
    assert re.fullmatch(r"checkpoints/\.logs/\d{8}-\d{6}/node0", options.log_dir)
    assert (options.module, options.training_script, options.training_script_args) == (
        True,
        "cola_train",
        arguments,
    )


def test_several_machines_meet_at_the_first(tmp_path: Path) -> None:
    for rank, (is_host, address) in enumerate([(True, "first.example"), (False, None)]):
        settings = {
            "NNODES": "2",
            "NODE_RANK": str(rank),
            "MASTER_ADDR": "first.example",
            "LOG_DIR": str(tmp_path),
        }
        _, options = dry_run("joint", **settings)
        config, _, worker = config_from_args(options)
        assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (
            2,
            2,
            8,
            0,
        )
        assert (config.rdzv_backend, config.rdzv_endpoint, config.run_id) == (
            "c10d",
            "first.example:29500",
            "cola_train",
        )
        meeting = RendezvousParameters(
            "c10d", config.rdzv_endpoint, config.run_id, 2, 2, **config.rdzv_configs
        )
        assert meeting.get_as_bool("is_host") is is_host
        assert config.local_addr == address
        assert worker == ["-u", "-m", "cola_train", "joint"]
        # Every process' both streams go to files, and the first one's to the console, too.
        assert config.logs_specs is not None
        logs = config.logs_specs.reify({process: {} for process in range(8)})
        assert {*logs.stdouts, *logs.stderrs} == set(range(8))
        assert all(
            path.startswith(str(tmp_path / f"node{rank}"))
            for path in [*logs.stdouts.values(), *logs.stderrs.values()]
        )
        assert (set(logs.tee_stdouts), set(logs.tee_stderrs)) == ({0}, {0})


def test_every_setting_that_the_script_names_is_one_that_it_reads_and_hands_on() -> None:
    assert set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / LAUNCH).read_text())) == SETTINGS
    given = dict.fromkeys(SETTINGS, "17") | {"MASTER_ADDR": "host"}
    environment, options = dry_run(**given)
    assert (
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
        == environment["OMP_NUM_THREADS"]
        == environment["OMP_WAIT_POLICY"]
        == "17"
    )
    assert (options.nnodes, options.nproc_per_node, options.max_restarts, options.local_addr) == (
        "17",
        "17",
        17,
        "17",
    )
    assert (options.rdzv_endpoint, options.rdzv_id, options.log_dir) == (
        "host:17",
        "17",
        "17/node17",
    )


def test_the_signals_are_those_that_a_training_takes_and_that_its_own_launcher_passes_on() -> None:
    _, options = dry_run("joint")
    forwarded = options.signals_to_handle.split(",")
    assert {number.name for number in interrupts._SIGNALS} <= set(forwarded)
    assert sorted(forwarded) == sorted(number.name for number in ENDING)


STAND_IN = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
def save(number, frame):
    if rank == "0":
        pathlib.Path("saved").write_text(signal.Signals(number).name)
        print("saved by", rank, flush=True)
        os._exit(0)
signal.signal(signal.SIGUSR2, save)
print("started", rank, flush=True)
print("trouble of", rank, file=sys.stderr, flush=True)
pathlib.Path(f"started-{rank}").touch()
time.sleep(60)
"""


def test_a_signal_reaches_every_process_and_what_does_not_end_is_killed(tmp_path: Path) -> None:
    # torchrun starts `-m cola_train`: in this folder that is the stand-in. Without an __init__.py
    # any later path's would win.
    (tmp_path / "cola_train").mkdir()
    (tmp_path / "cola_train" / "__init__.py").touch()
    (tmp_path / "cola_train" / "__main__.py").write_text(STAND_IN)
    settings = {
        "NPROC_PER_NODE": "2",
        "LOG_DIR": str(tmp_path / "logs"),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "2",
    }
    command, environment = ["bash", str(ROOT / LAUNCH)], {**clean_environment(), **settings}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **streams) as program:
        try:
            wait_until(lambda: len(list(tmp_path.glob("started-*"))) == 2, program)
            program.send_signal(signal.SIGUSR2)
            out, err = program.communicate(timeout=20)
        finally:
            program.kill()
    assert (tmp_path / "saved").read_text() == "SIGUSR2"
    assert "closing signal SIGUSR2" in err
    assert re.findall(r"process (\d+) via 12, forcefully exiting via 9", err), (
        "the second process does not end by itself"
    )
    # The console has the first process' lines, the files have everyone's.
    assert out == "[0] started 0\n[0] saved by 0\n"
    assert "[0] trouble of 0" in err
    assert "trouble of 1" not in err
    for rank, last in enumerate(("saved by 0", "started 1")):
        (folder,) = (tmp_path / "logs" / "node0").glob(f"*/attempt_0/{rank}")
        assert (folder / "stdout.log").read_text().splitlines()[-1] == last
        assert (folder / "stderr.log").read_text() == f"trouble of {rank}\n"


def wait_until(
    condition: Callable[[], bool], *programs: subprocess.Popen[str], seconds: float = 60
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(program.poll() is None for program in programs), "ended too early"
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)


@dataclasses.dataclass(frozen=True)
class FakeSlurm:
    """A `srun` that runs its command once a node, notes its arguments and leaves a status.json, and
    a `scontrol`.
    """

    folder: Path

    def __post_init__(self) -> None:
        srun = """
            printf '%s\\n' "$@" > "$FOLDER/srun"
            while [[ "$1" == --* ]]; do shift; done
            for node in 0 1; do SLURM_NODEID=$node "$@" || exit; done
            [ -z "${AFTER:-}" ] || echo "$AFTER" > "$RUN/status.json"
            exit "${STATUS:-0}"
        """
        scontrol = """
            if [ "$*" = "show hostnames node[08-09]" ]; then
                printf 'node08\\nnode09\\n'
            else
                echo "$*" > "$FOLDER/scontrol"
            fi
        """
        (self.folder / "bin").mkdir()
        for name, text in (("srun", srun), ("scontrol", scontrol)):
            (self.folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (self.folder / "bin" / name).chmod(0o755)

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        slurm = {
            "SLURM_JOB_ID": "123456",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "node[08-09]",
            "NPROC_PER_NODE": "8",
        }
        path = f"{self.folder / 'bin'}{os.pathsep}{clean_environment()['PATH']}"
        places = {"PATH": path, "FOLDER": str(self.folder), "RUN": str(self.folder)}
        return shell("bash", SBATCH, *arguments, **{**slurm, **places, **settings})

    def asked_of_scontrol(self) -> str | None:
        path = self.folder / "scontrol"
        return path.read_text().strip() if path.exists() else None


def test_slurm_starts_one_torchrun_a_node(tmp_path: Path) -> None:
    slurm = FakeSlurm(tmp_path)
    done = slurm.run("--dry-run", *TRAINING, "name=a b")
    assert done.returncode == 0, done.stderr
    nodes = [parsed(line) for line in done.stdout.splitlines()]
    assert len(nodes) == 2
    for rank, (_, options) in enumerate(nodes):
        assert (options.nnodes, options.nproc_per_node) == ("2", "8")
        assert (options.rdzv_endpoint, options.rdzv_id) == ("node08:23456", "123456")
        assert (options.rdzv_conf, options.log_dir) == (
            f"is_host={str(rank == 0).lower()}",
            f"checkpoints/.logs/123456/node{rank}",
        )
        assert options.training_script_args == [*TRAINING, "name=a b"]
    # A dry run prints that call of srun and no more.
    called = (tmp_path / "srun").read_text().splitlines()
    printed = slurm.run("--dry-run", *TRAINING, "name=a b", DRY_RUN="1").stdout.splitlines()
    assert shlex.split(printed[0])[shlex.split(printed[0]).index("srun") + 1 :] == called
    assert shlex.split(printed[1], comments=True) == ["scontrol", "requeue", "123456"]
    assert slurm.asked_of_scontrol() is None


@pytest.mark.parametrize(
    ("before", "after", "ended", "requeued"),
    [
        (None, ("interrupted", 5), 1, True),
        (("interrupted", 5), ("interrupted", 9), 1, True),
        (("interrupted", 5), None, 1, False),  # failed before it could say so
        # no step further: nor would it be the next time
        (("interrupted", 5), ("interrupted", 5), 1, False),
        (("interrupted", 5), ("finished", 9), 0, False),
        (("interrupted", 5), ("failed", 7), 1, False),
        (None, ("stopped", 7), 3, False),
        (None, None, 2, False),
    ],
)
def test_slurm_requeues_a_run_that_was_interrupted(
    tmp_path: Path,
    before: tuple[str, int] | None,
    after: tuple[str, int] | None,
    ended: int,
    requeued: bool,
) -> None:
    def text(status: tuple[str, int]) -> str:
        return json.dumps({"state": status[0], "step": status[1], "reason": ""})

    slurm = FakeSlurm(tmp_path)
    if before is not None:
        (tmp_path / "status.json").write_text(text(before) + "\n")
    done = slurm.run("--dry-run", *TRAINING, AFTER=text(after) if after else "", STATUS=str(ended))
    assert done.returncode == (0 if requeued else ended), done.stderr
    assert slurm.asked_of_scontrol() == ("requeue 123456" if requeued else None)


def test_slurm_wants_the_runs_folder() -> None:
    done = shell("bash", SBATCH, *TRAINING)
    assert done.returncode != 0
    assert "RUN: set RUN to the folder of the run" in done.stderr


def test_slurm_signals_all_but_the_shell_and_leaves_time_to_save() -> None:
    options = dict(
        line.split(" ")[1].partition("=")[::2]
        for line in (ROOT / SBATCH).read_text().splitlines()
        if "#SBATCH" in line[:7]
    )
    name, seconds = options["--signal"].split("@")
    environment, torchrun = dry_run("joint")
    assert f"SIG{name}" in torchrun.signals_to_handle.split(",")
    assert int(seconds) > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert {"--requeue", "--open-mode", "--ntasks-per-node"} < options.keys()


def test_the_pytorchjob_runs_the_script_with_settings_that_it_reads() -> None:
    job = yaml.safe_load((ROOT / "docs/kubernetes.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert list(replicas) == ["Master", "Worker"]
    machines = sum(replica["replicas"] for replica in replicas.values())
    meetings = set()
    for rank, replica in enumerate(replicas.values()):
        assert replica["restartPolicy"] == "OnFailure"
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        settings = {entry["name"]: entry["value"] for entry in container["env"]}
        assert set(settings) <= SETTINGS
        # What the operator adds to the container's variables; Kubernetes puts them into its
        # command.
        operator = {
            "RANK": str(rank),
            "MASTER_ADDR": "cola-joint-master-0",
            "MASTER_PORT": "23456",
            "WORLD_SIZE": str(machines),
        }
        command = [word.replace("$(RANK)", operator["RANK"]) for word in container["command"]]
        command.insert(command.index(LAUNCH) + 1, "--dry-run")
        done = shell(*command, **operator, **settings)
        environment, options = parsed(done.stdout)
        assert int(options.nnodes) == machines
        assert int(options.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert (options.rdzv_conf, options.local_addr) == [
            ("is_host=true", "cola-joint-master-0"),
            ("is_host=false", None),
        ][rank]
        meetings.add((options.rdzv_endpoint, options.rdzv_id))
        assert pod["terminationGracePeriodSeconds"] > int(
            environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
        )
        assert_fits(options.training_script_args, machines * int(options.nproc_per_node))
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        places = [
            argument.partition("=")[2]
            for argument in options.training_script_args
            if "=/" in argument
        ]
        for place in [*places, options.log_dir]:
            assert any(
                place.startswith(mount) and "persistentVolumeClaim" in volume
                for mount, volume in mounts.items()
            ), place
    assert len(meetings) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_guide_is_one_that_exists(command: str) -> None:
    words = shlex.split(command)
    count = next(place for place, word in enumerate(words) if "=" not in word)
    settings, words = dict(word.split("=", 1) for word in words[:count]), words[count:]
    if words == ["kubectl", "apply", "-f", "docs/kubernetes.yaml"]:
        return  # read by a test of its own
    if words[0] == "cola-train":
        if words[1] == "doctor":
            assert_verb(words[1:])
        else:
            assert_fits(
                words[1:],
                load_config(JointRunConfig, ROOT / words[2], words[3:]).parallel.num_processes,
            )
        return
    if words[0] == "sbatch":
        place = words.index(SBATCH)
        assert {word.split("=")[0] for word in words[1:place]} <= {
            "--nodes",
            "--gpus-per-node",
            "--exclusive",
        }
        assert settings.keys() == {"RUN"}
        words, settings = ["bash", *words[place:]], {**settings, "DRY_RUN": "1"}
    if words[1] == SBATCH:
        assert settings["DRY_RUN"] == "1"
        done = shell(*words, **settings)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0].endswith(f"launch {shlex.join(words[2:])} ")
        assert_fits(words[2:], 16)
        return
    assert words[:2] == ["bash", LAUNCH]
    assert settings.keys() <= SETTINGS
    arguments = words[3:] if words[2] == "--dry-run" else words[2:]
    _, options = dry_run(*arguments, **settings)
    if arguments == ["doctor"]:
        assert_verb(arguments)
    else:
        assert_fits(options.training_script_args, int(options.nnodes) * int(options.nproc_per_node))


def assert_verb(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--help"])
    assert end.value.code == 0


def test_the_guide_names_the_signals_of_a_training_and_no_other_setting() -> None:
    saved = {
        name
        for row in re.findall(r"^\| (SIG.*?) \|.*(?:save|same)", GUIDE, re.M)
        for name in row.split(", ")
    }
    assert saved == {number.name for number in interrupts._SIGNALS}
    named = set(re.findall(r"`([A-Z_]{6,})`", GUIDE)) - {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"}
    assert named
    assert named <= SETTINGS


@dataclasses.dataclass(frozen=True)
class Host:
    """A network namespace, with one end of a cable in it."""

    name: str
    interface: str
    address: str


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two hosts that reach each other and nothing else. This machine's host name is that of both
    and resolves to neither.
    """
    if shutil.which("ip") is None:
        pytest.skip("no program `ip` (package iproute2) to make network namespaces with")
    pair = [
        Host(f"cola-{os.getpid()}-{n}", f"cola{os.getpid()}{'ab'[n]}", f"10.213.7.{n + 1}")
        for n in range(2)
    ]
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ip(
                "link",
                "add",
                pair[0].interface,
                "netns",
                pair[0].name,
                "type",
                "veth",
                "peer",
                pair[1].interface,
                "netns",
                pair[1].name,
            )
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
                ip("-n", host.name, "link", "set", "lo", "up")
                ip("-n", host.name, "link", "set", host.interface, "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces may not be made here: {error.stderr.strip()}")
        yield pair
    finally:
        for host in pair:
            with contextlib.suppress(subprocess.CalledProcessError):
                for process in ip("netns", "pids", host.name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(process), signal.SIGKILL)
                ip("netns", "delete", host.name)


@pytest.mark.slow
def test_two_hosts_stop_at_one_hosts_signal_and_go_on_to_the_numbers_of_one_process(
    hosts: list[Host], vae_config: Callable[..., VAERunConfig], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        changes = [
            "trainer.max_steps=40",
            "optim.decay=100",
            "trainer.micro_batch_size=2",
            "checkpoint.every_steps=1000",
        ]
        (tmp_path / f"{name}.yaml").write_text(
            to_yaml(vae_config(name, *changes)), encoding="utf-8"
        )
    done = cola_train("vae", "one.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "two"

    def start(attempt: int) -> list[subprocess.Popen[str]]:
        programs = []
        for rank, host in enumerate(hosts):
            settings = {
                "NNODES": "2",
                "NODE_RANK": str(rank),
                "NPROC_PER_NODE": "1",
                "MASTER_ADDR": hosts[0].address,
            }
            places = {
                "LOCAL_ADDR": host.address,
                "GLOO_SOCKET_IFNAME": host.interface,
                "LOG_DIR": str(tmp_path / f"logs{attempt}"),
            }
            command = [
                "ip",
                "netns",
                "exec",
                host.name,
                "bash",
                str(ROOT / LAUNCH),
                "vae",
                "two.yaml",
            ]
            with (tmp_path / f"console{attempt}-{rank}").open("w") as console:
                environment = {**clean_environment(), **settings, **places}
                programs.append(
                    subprocess.Popen(
                        command,
                        cwd=tmp_path,
                        env=environment,
                        stdout=console,
                        stderr=console,
                        text=True,
                    )
                )
        return programs

    def console(attempt: int, rank: int) -> str:
        return (tmp_path / f"console{attempt}-{rank}").read_text()

    def status() -> dict[str, Any]:
        return json.loads((run / "status.json").read_text())

    programs = start(1)
    lines = run / "metrics.jsonl"
    wait_until(lambda: lines.exists() and lines.read_text().count("\n") > 5, *programs, seconds=120)
    programs[0].send_signal(signal.SIGUSR2)
    for program in programs:
        program.wait(timeout=60)
    assert status()["state"] == "interrupted", console(1, 0) + console(1, 1)
    assert 0 < status()["step"] < 40
    assert not (run / "hf").exists()

    for program in start(2):
        assert program.wait(timeout=120) == 0, console(2, 0) + console(2, 1)
    assert status() == {"state": "finished", "step": 40, "reason": ""}
    assert (run / "hf" / "cola_dlm" / "cola_vae").is_dir()
    assert figures(run) == pytest.approx(figures(tmp_path / "one"), rel=1e-5, abs=1e-6)
    # The first host is rank 0 and says how far it is; both keep their logs.
    assert "[0] training: 100%" in console(2, 0)
    assert "training:" not in console(2, 1)
    assert [
        len(list((tmp_path / "logs2" / f"node{rank}").glob("*/attempt_0/0/stderr.log")))
        for rank in range(2)
    ] == [1, 1]


_MEETS = """
import sys
import torch.distributed as dist
from cola_train import processes
processes._GRACE_SECONDS, processes._SECONDS_TO_NOTICE = 0, 1
make = dist.FileStore
def after_a_word(*arguments):
    made = make(*arguments) if sys.argv[1] == "then" else None
    print("ready", flush=True)
    sys.stdin.readline()
    return made or make(*arguments)
dist.FileStore = after_a_word
with processes.connected("cpu", 1):
    print("met")
"""


@pytest.mark.parametrize("when, status", [("then", 2), ("before", -signal.SIGALRM)])
def test_one_that_is_stopped_where_all_meet_does_not_keep_the_others(
    when: str, status: int, tmp_path: Path
) -> None:
    """It has the lock of the file then, before the other's store is made or after."""
    store = tmp_path / "store"
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    process = subprocess.Popen(
        [sys.executable, "-c", _MEETS, when],
        env={**clean_environment(), **place, STORE: str(store)},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with store.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        out, error = process.communicate("go on\n", timeout=60)
    assert (process.returncode, out) == (status, "")
    said = "cola-train: error: Rank 1 has waited 2 s to meet the other processes"
    assert error.startswith(said) == (when == "then"), error
    assert "Traceback" not in error

"""What a run opens to others: its sockets, and the modes of what it writes; as tables, too."""

import collections
import functools
import lzma
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from cola_train.operations.watched import RunMonitor
from cola_train.programs import start
from tests.helpers.programs import clean_environment
from tests.helpers.runs import BOOK, SMALL, SMALL_DIT
from tests.processes.program import Program, processes_in
from tests.processes.strikes import begin

_KINDS = {
    (socket.AF_INET, socket.SOCK_STREAM): "TCP",
    (socket.AF_INET6, socket.SOCK_STREAM): "TCP6",
    (socket.AF_INET, socket.SOCK_DGRAM): "UDP",
    (socket.AF_INET6, socket.SOCK_DGRAM): "UDP6",
}
_LISTENING = 0x10000  # the flag __SO_ACCEPTCON in /proc/net/unix


class Socket(NamedTuple):
    """A socket of a process of a run.

    Attributes:
        owner: the process' place in the run.
        kind: "TCP", "TCP6", "UDP", "UDP6", "unix", or "other".
        address: its own: an IP address without the port, or a path without its random parts; empty
            for a pair of sockets that has none.
        state: "listens", or "connected" for all else.
        peer: the other's IP address.
    """

    owner: str
    kind: str
    address: str
    state: str
    peer: str


def sockets_of(program: Program) -> Iterator[Socket]:
    """Every socket that a process of the run has open now."""
    for owner, process in _owners(program).items():
        try:
            descriptors, known = _descriptors(process), process.net_connections(kind="all")
        except (psutil.Error, OSError):
            continue  # it has ended
        for connection in known:
            inode = descriptors.pop(connection.fd, None)
            if inode is None:
                continue  # opened between the two looks
            if connection.family == socket.AF_UNIX:
                path = _without_chance(connection.laddr or "")
                state = "listens" if _listens(inode) else "connected"
                yield Socket(owner, "unix", path, state, "")
                continue
            state = "listens" if connection.status == psutil.CONN_LISTEN else "connected"
            peer = connection.raddr.ip if connection.raddr else ""
            kind = _KINDS[connection.family, connection.type]
            yield Socket(owner, kind, connection.laddr.ip, state, peer)
        # What psutil does not know is of no kind above, if it is still there.
        for descriptor, inode in descriptors.items():
            if _descriptors(process).get(descriptor) == inode:
                yield Socket(owner, "other", "", "connected", "")


def sockets_of_a_run(rows: Path, folder: Path) -> dict[Socket, int]:
    """The sockets of a run of two processes, from its start into its steps.

    Returns:
        How many of each there were at most at one moment.
    """
    most: dict[Socket, int] = {}
    with begin(rows, folder, real=True) as program:
        monitor = RunMonitor(program, program.run_folder)  # type: ignore[arg-type]

        def seen() -> bool:
            for entry, number in collections.Counter(sockets_of(program)).items():
                most[entry] = max(number, most.get(entry, 0))
            return monitor.step >= 10

        if not monitor.until(seen):
            raise program.failure("it ended early")
    return most


def socket_table(sockets: Mapping[Socket, int]) -> str:
    """A table in Markdown."""
    rows = [[*entry, str(number)] for entry, number in sorted(sockets.items())]
    return _markdown(["process", "kind", "own address", "state", "peer", "at most"], rows)


def write_everything(folder: Path, umask: int) -> None:
    """Run the commands that write, under a umask: what they leave is all that lies in `folder`."""
    with tempfile.TemporaryDirectory() as outside:
        _write(folder, Path(outside), umask)


def _write(folder: Path, outside: Path, umask: int) -> None:
    temporary, book = outside / "tmp", outside / "book.txt"
    temporary.mkdir()
    book.write_bytes(lzma.decompress(BOOK.read_bytes())[:60_000].rsplit(b"\n", 1)[0])
    corpus = f"corpus.inputs=[{book}]"
    rows = ["out=rows", "tokenizer=tokenizer.json", "seq_len=32", "held_out_share=0.1"]
    run = [*SMALL, *SMALL_DIT, "objective.reference_weight=0", "data.path=rows", "name=run"]
    run += ["parallel.num_processes=2", "trainer.micro_batch_size=2", "trainer.max_steps=3"]
    for arguments in (
        ["tokenizer", "train", "out=tokenizer.json", corpus, "vocab_size=320"],
        ["prepare", *rows, corpus],
        ["joint", *run, "trainer.sample_every_steps=2", "trainer.sample_prompts=[It was]"],
        ["export", "checkpoints/run", "--out", "exported"],
        ["sample", "exported", "--prompt", "It was", "--out", "samples.jsonl", "num_steps=2"],
    ):
        with (outside / "log").open("ab") as log:
            program = start(
                "cola_train",
                arguments,
                (log.fileno(), log.fileno()),
                environment={**clean_environment(), "TMPDIR": str(temporary)},
                folder=folder,
                first=functools.partial(_set_umask, umask),
            )
        program.join(300)
        assert program.exitcode == 0, (outside / "log").read_text()
    assert not [path for path in temporary.iterdir() if path.name.startswith("cola-train")]


def modes(folder: Path) -> dict[str, int]:
    """The permissions of everything in a folder, by path; folders end with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        name = f"{path.relative_to(folder)}{'/' if stat.S_ISDIR(status.st_mode) else ''}"
        found[name] = stat.S_IMODE(status.st_mode)
    return found


def mode_table(by_umask: Mapping[int, Mapping[str, int]]) -> str:
    """A table in Markdown: files and folders of each command's output, and their modes."""
    rows = []
    for top in sorted({name.partition("/")[0] for of in by_umask.values() for name in of}):
        for ending, what in (("/", "folders"), ("", "files")):
            columns = []
            for of in by_umask.values():
                inside = [
                    mode
                    for name, mode in of.items()
                    if name.partition("/")[0] == top and name.endswith("/") == bool(ending)
                ]
                columns.append(", ".join(sorted({f"{mode:04o}" for mode in inside})))
            if any(columns):
                rows.append([f"`{top}`", what, str(len(inside)), *columns])
    return _markdown(["output", "", "number", *[f"umask {mask:03o}" for mask in by_umask]], rows)


def _owners(program: Program) -> dict[str, psutil.Process]:
    # First who is there: whoever is forked while the others are asked for is named next time, and
    # not by the name of the process that it was forked from.
    there = processes_in(program.folder)
    places = {process.pid: f"rank {rank}" for rank, process in enumerate(program.ranks())}
    places[program.launcher.pid] = "launcher"
    owners: dict[str, psutil.Process] = {}
    readers: collections.Counter[str] = collections.Counter()
    for process in there:
        try:
            parent = places.get(process.ppid(), "")
        except psutil.Error:
            continue
        name = places.get(process.pid) or _name_of_helper(process)
        if parent.startswith("rank"):
            name = f"reader {readers[parent]} of {parent}"
            readers[parent] += 1
        owners[name] = process
    return owners


def _name_of_helper(process: psutil.Process) -> str:
    """Python's own, which fork for the launcher and sweep after it, by what they say they do."""
    try:
        text = " ".join(process.cmdline())
    except psutil.Error:
        text = ""
    found = re.search(r"multiprocessing\.(\w+)", text)
    return found[1] if found else "just started"


def _descriptors(process: psutil.Process) -> dict[int, str]:
    """The inode of every socket that a process has open, by descriptor."""
    found = {}
    folder = Path("/proc", str(process.pid), "fd")
    for name in os.listdir(folder):  # noqa: PTH208  # names alone
        try:
            target = os.readlink(folder / name)  # noqa: PTH115  # no path
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            found[int(name)] = target[8:-1]
    return found


def _listens(inode: str) -> bool:
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] == inode:
            return bool(int(fields[3], 16) & _LISTENING)
    return False


def _without_chance(path: str) -> str:
    """`pymp-x1y2z3/listener-a8b9c0` as pymp-*/listener-*."""
    parts = Path(path).parts[-2:]
    return "/".join(f"{part.partition('-')[0]}-*" if "-" in part else part for part in parts)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _set_umask(umask: int) -> None:
    os.umask(umask)

"""The library itself: it misses nothing that strace sees, and strikes what it is told to."""

import collections
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.faults.library import VARIABLE, Control, Strike, build, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


def run(
    library: Path, folder: Path, program: str, strike: Strike | None = None, *before: str
) -> tuple[subprocess.CompletedProcess[str], Control]:
    """Run a Python program under the library, in `folder`; `before` starts it."""
    folder.mkdir(exist_ok=True)
    control = Control(folder.parent / "control", folder, strike)
    done = subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(program)],
        cwd=folder,
        env={**os.environ, "LD_PRELOAD": str(library), VARIABLE: str(control.path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done, control


WRITES = """
    import os
    with open("a", "wb", buffering=0) as file:
        file.write(b"0123456789")
        os.fsync(file.fileno())
    os.rename("a", "b")
    os.mkdir("c")
    os.remove("b")
    os.rmdir("c")
"""
NAMES = ["create", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir"]


def test_operations_are_named_in_order(library: Path, tmp_path: Path) -> None:
    done, control = run(library, tmp_path / "in", WRITES)
    assert done.returncode == 0, done.stderr
    found = control.operations()
    assert [one.name for one in found] == NAMES
    assert [one.number for one in found] == [*range(1, len(NAMES) + 1)]
    assert [one.path for one in found] == ["a", "a", "a", "a", "b", "c", "b", "c"]
    assert not any(one.struck for one in found)


@pytest.mark.parametrize(("mode", "number"), [("EIO", 5), ("ENOSPC", 28)])
@pytest.mark.parametrize("at", range(1, len(NAMES) + 1))
def test_the_nth_operation_fails_and_no_other(
    library: Path, tmp_path: Path, mode: str, number: int, at: int
) -> None:
    done, control = run(library, tmp_path / "in", WRITES, Strike("exec", at, mode))  # type: ignore[arg-type]
    assert re.search(rf"OSError: \[Errno {number}\]", done.stderr), done.stderr
    assert [one.name for one in control.operations() if one.struck] == [NAMES[at - 1]]
    if NAMES[at - 1] == "write":
        assert (tmp_path / "in" / "a").read_bytes() == b""


def test_a_full_disk_takes_nothing_more_but_lets_go(library: Path, tmp_path: Path) -> None:
    program = """
        import os, pathlib
        os.mkdir("before")
        for act in (lambda: os.mkdir("new"), lambda: pathlib.Path("file").write_text("text")):
            try:
                act()
            except OSError as error:
                assert error.errno == 28
        os.rename("before", "after")
        os.rmdir("after")
    """
    done, control = run(library, tmp_path / "in", program, Strike("exec", 2, "full"))
    assert done.returncode == 0, done.stderr
    assert [one.name for one in control.operations()][:3] == ["mkdir", "mkdir", "create"]
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("at", range(1, len(NAMES) + 1))
def test_a_process_is_killed_at_the_nth_operation_in_the_middle_of_a_write(
    library: Path, tmp_path: Path, at: int
) -> None:
    done, control = run(library, tmp_path / "in", WRITES, Strike("exec", at, "kill"))
    assert done.returncode == -9
    assert len(control.operations()) == at
    left = {path.name: path for path in (tmp_path / "in").iterdir()}
    assert [*left] == [[], ["a"], ["a"], ["a"], ["a"], ["b"], ["b", "c"], ["c"]][at - 1] or at == 7
    if at == 2:
        assert left["a"].read_bytes() == b"01234"


def test_each_process_counts_for_itself_under_a_name_that_does_not_change(
    library: Path, tmp_path: Path
) -> None:
    program = """
        import os
        for _ in range(2):
            if os.fork() == 0:
                if os.fork() == 0:
                    os.mkdir(f"{os.getpid()}")
                    os._exit(0)
                os.wait()
                os.mkdir(f"{os.getpid()}")
                os._exit(0)
        os.wait(), os.wait()
        os.mkdir("last")
    """
    done, control = run(library, tmp_path / "in", program)
    assert done.returncode == 0, done.stderr
    found = sorted((one.process, one.number) for one in control.operations())
    names = ["exec", "exec.1", "exec.1.1", "exec.2", "exec.2.1"]
    assert found == [(name, 1) for name in names]


LIBRARIES = """
    import os, shutil
    from pathlib import Path

    import numpy
    import pyarrow
    import pyarrow.parquet
    from safetensors.numpy import save_file

    Path("folder/deep").mkdir(parents=True)
    Path("folder/text").write_text("text")
    with open("folder/text", "a+b", buffering=0) as file:
        file.write(b"more")
        file.truncate(3)
        os.pwrite(file.fileno(), b"x", 0)
    shutil.copyfile("folder/text", "folder/copy")
    os.replace("folder/copy", "folder/moved")
    os.link("folder/moved", "folder/linked")
    os.symlink("moved", "folder/symbolic")
    save_file({"w": numpy.zeros(1000)}, "folder/w.safetensors")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), "folder/table.parquet")
    descriptor = os.open("folder", os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    shutil.rmtree("folder")
"""
# What strace calls them, and the library.
_CALLS = {
    "write": "write",
    "pwrite64": "write",
    "writev": "write",
    "sendfile": "write",
    "copy_file_range": "write",
    "fsync": "fsync",
    "fdatasync": "fsync",
    "ftruncate": "truncate",
    "fallocate": "allocate",
    "rename": "rename",
    "renameat": "rename",
    "renameat2": "rename",
    "link": "link",
    "linkat": "link",
    "symlink": "link",
    "symlinkat": "link",
    "unlink": "unlink",
    "unlinkat": "unlink",
    "mkdir": "mkdir",
    "mkdirat": "mkdir",
    "rmdir": "rmdir",
}


def traced(lines: list[str], folder: Path) -> collections.Counter[str]:
    """The operations below `folder` in a trace by `strace -f -y`."""
    found: collections.Counter[str] = collections.Counter()
    # Of one file the flags that it was opened with are known by its descriptor.
    writable: dict[str, bool] = {}
    for line in lines:
        match = re.match(r"(?:\d+ +)?(\w+)\((.*)", line)
        if match is None or "ENOENT" in line:
            continue
        call, rest = match.groups()
        # A path that does not begin with "/" counts from the folder before it.
        by_descriptor, by_path = rf"\d<{folder}[/>]", rf'AT_FDCWD<{folder}>, "[^/]|"{folder}/'
        inside = re.search(f"{by_descriptor}|{by_path}", rest) is not None
        if call in ("openat", "open", "creat"):
            opened = re.search(r"= (\d+)<", rest)
            writes = re.search(r"O_(WRONLY|RDWR|CREAT)|^creat", rest) is not None
            if opened:
                writable[opened[1]] = writes and inside
            if writes and inside:
                found["create" if "O_CREAT" in rest or call == "creat" else "open"] += 1
        elif call == "close":
            number = re.match(r"(\d+)", rest)
            if number and writable.pop(number[1], False):
                found["close"] += 1
        elif call in _CALLS and inside:
            name = "rmdir" if "AT_REMOVEDIR" in rest else _CALLS[call]
            found[name] += 1
    return found


def test_nothing_that_python_or_its_libraries_do_is_missed(library: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace to compare with")
    log = tmp_path / "trace"
    trace = ("strace", "-f", "-y", "-s", "0", "-o", str(log), "-e")
    calls = ",".join(["open", "openat", "creat", "close", *_CALLS])
    done, control = run(library, tmp_path / "in", LIBRARIES, None, *trace, f"trace={calls}")
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()[:100]}")
    assert done.returncode == 0, done.stderr
    expected = traced(log.read_text().splitlines(), (tmp_path / "in").resolve())
    # safetensors writes under another name, and gives the file its own by a call of the kernel.
    expected["rename"] -= 1
    assert collections.Counter(one.name for one in control.operations()) == expected
    assert expected.total() > 35

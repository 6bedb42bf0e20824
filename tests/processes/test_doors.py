"""Nothing of a run is reachable from outside, and what is written has the modes of the umask."""

import ipaddress
import re
from pathlib import Path

import pytest

from tests.processes.doors import modes, sockets_of_a_run, write_everything


@pytest.mark.slow
def test_a_run_opens_nothing_beyond_the_machine(prepared_folder: Path, tmp_path: Path) -> None:
    sockets = sockets_of_a_run(prepared_folder, tmp_path)
    assert {entry.owner for entry in sockets} >= {"rank 0", "rank 1", "reader 0 of rank 0"}
    for entry in sockets:
        assert entry.kind in ("TCP", "TCP6", "unix"), entry
        if entry.kind != "unix":
            assert ipaddress.ip_address(entry.address).is_loopback, entry
            assert not entry.peer or ipaddress.ip_address(entry.peer).is_loopback, entry
            # Only those that exchange gradients, and readers, forked from them with all they have.
            assert re.fullmatch(r"(reader \d of )?rank \d", entry.owner), entry
        elif entry.state == "listens":
            # In multiprocessing's folder, which is for its owner alone.
            assert entry.address == "pymp-*/listener-*", entry


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    write_everything(tmp_path, umask)
    written = modes(tmp_path)
    for name in ("tokenizer.json", "rows/", "checkpoints/run/hf/", "exported/", "samples.jsonl"):
        assert name in written
    for name, mode in written.items():
        assert mode == (0o777 if name.endswith("/") else 0o666) & ~umask, name

"""Standard error may fail, or not be there at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cola_train.console import outliving_console, progress_bar, say


def test_what_cannot_be_said_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with outliving_console():
            say("heard")
            os.close(read)
            say("unheard")
            with progress_bar("work", "step", total=3) as bar:
                bar.update(3)
            with outliving_console():
                print("unheard too", file=sys.stderr)
        assert sys.stderr is stream
        # What a library writes to the descriptor itself does not fail either.
        os.write(write, b"unheard")


def test_a_disk_that_has_room_again_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Log:
        full, text = True, ""

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    with outliving_console():
        say("lost")
        log.full = False
        say("kept")
    assert log.text == "kept\n"


_OPENS = """
import os, sys
from cola_train.console import open_standard_streams, say
open_standard_streams()
say("into nothing")
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
os.write(2, b"said by a library")
sys.exit(0 if descriptor > 2 else 3)
"""


def test_a_file_never_gets_the_number_of_a_closed_stderr(tmp_path: Path) -> None:
    path = tmp_path / "file"
    command = ["bash", "-c", 'exec "$0" -c "$1" "$2" 2>&-', sys.executable, _OPENS, str(path)]
    assert subprocess.run(command, check=False).returncode == 0
    assert path.read_bytes() == b""

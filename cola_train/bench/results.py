"""Where results go: JSON on stdout or in a new file."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_train.config.settings import require
from cola_train.files import write_atomically


def refuse_existing(*paths: Path | None) -> None:
    """Before anything is measured.

    Raises:
        UserError: one of them exists.
    """
    for path in paths:
        require(
            path is None or not path.exists(),
            f"{path} exists and is not overwritten; choose another name.",
        )


def deliver(result: Mapping[str, Any], out: str | None) -> None:
    """Write a result to `out`, or to stdout."""
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_atomically(Path(out), text)

"""Running this project's programs as a user would: from an environment that no earlier training of this process has written to."""

import os
import sys
from pathlib import Path


def clean_environment() -> dict[str, str]:
    """The environment, this interpreter's programs first, without the address of a process group that lives in this process."""
    launcher = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**kept, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

"""Running this project's programs as a user would: from an environment that no earlier training of
this process has written to.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def clean_environment() -> dict[str, str]:
    """The environment, this interpreter's programs first, without the address of a process group
    that lives in this process.
    """
    launcher = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def torchrun(
    processes: int, module: str, *arguments: str, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run a module of this repository in processes of one machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    return subprocess.run(
        [*command, "--module", module, *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

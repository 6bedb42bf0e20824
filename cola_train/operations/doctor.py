"""`cola-train doctor`: what this machine or job offers a training, how fast it is, and what is
wrong with it.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from cola_train.config.settings import require
from cola_train.operations.bandwidth import Bandwidth, measure_bandwidth
from cola_train.operations.disk import Disk, existing_folder, measure_disk
from cola_train.operations.job import Launcher, current_job, read_launcher
from cola_train.operations.machine import Devices, Versions, read_devices, read_versions
from cola_train.operations.problems import Facts, problems

_SectionT = TypeVar("_SectionT", Versions, Devices, Launcher, Bandwidth, Disk)


def doctor(folder: Path, num_processes: int, as_json: bool) -> int:
    """Report to stdout on versions, devices, launcher, bandwidth, disk and what is wrong.

    Args:
        folder: where runs are to lie; if it does not exist, the nearest folder above it is
            measured. Nothing stays there.
        num_processes: workers between which to measure bandwidth on this machine. Under torchrun it
            is measured between the job's processes instead, and only rank 0 reports.
        as_json: one JSON object rather than text: the fields of `Facts`, and `problems`.

    Returns:
        The exit status: 1 if something is wrong, otherwise 0. Ranks other than 0 return 0 and leave
        judgement to it.

    Raises:
        UserError: `folder` is a file, or `num_processes` is below 1.
    """
    require(num_processes >= 1, f"--processes must be at least 1, not {num_processes}.")
    measured = existing_folder(folder)
    job = current_job()
    if job is not None and job.rank != 0:
        failure = measure_bandwidth(job, num_processes).failure
        if failure is not None:
            sys.stderr.write(f"cola-train doctor: rank {job.rank}: {failure}\n")
        return 0

    def shown(section: _SectionT) -> _SectionT:
        # At once: if the next section hangs, as on a dead network disk, one sees which.
        if not as_json:
            _write(_text(type(section).__name__.lower(), section.lines()))
        return section

    facts = Facts(
        versions=shown(read_versions()),
        devices=shown(read_devices()),
        launcher=shown(read_launcher(job, num_processes)),
        bandwidth=shown(measure_bandwidth(job, num_processes)),
        disk=shown(measure_disk(measured)),
    )
    found = problems(facts)
    if as_json:
        _write(
            json.dumps(
                {**asdict(facts), "problems": [asdict(problem) for problem in found]}, indent=2
            )
        )
    else:
        _write(
            "\n".join(
                [
                    "what is wrong",
                    *(f"  {line}" for line in (map(str, found) if found else ["nothing"])),
                ]
            )
        )
    return 1 if found else 0


def _text(title: str, lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in lines), ""])


def _write(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()

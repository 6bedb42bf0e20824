"""`cola-train doctor`: what a machine or job offers a training, its speed, and what is wrong."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from cola_train.config.settings import require
from cola_train.operations.bandwidth import measure_bandwidth
from cola_train.operations.disk import existing_folder, measure_disk
from cola_train.operations.job import current_job, read_launcher
from cola_train.operations.machine import read_devices, read_versions
from cola_train.operations.problems import Facts, problems
from cola_train.operations.report import Section, report

_SectionT = TypeVar("_SectionT", bound=Section)


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
        # At once: if the next section hangs, as on a dead network disk, the user sees which.
        if not as_json:
            report(section)
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
        every = {**asdict(facts), "problems": [asdict(problem) for problem in found]}
        report(json.dumps(every, indent=2))
    else:
        report("what is wrong")
        for line in map(str, found) if found else ["nothing"]:
            report(f"  {line}")
    return 1 if found else 0

"""What a worker does: one compression, from files to what is to be written. It may run on another machine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from htcompress.conversion import converted
from htcompress.errors import UnreachableError
from htcompress.graphs.calibration import Calibration
from htcompress.report import Report
from htcompress.report.study import Case
from htcompress.request import Request
from htcompress.study.files import files_used


@dataclass(frozen=True)
class Job:
    """A case with all that it takes; paths are absolute, for a worker may stand elsewhere."""

    case: Case
    checkpoint: str
    request: Request
    data: Calibration = field(default_factory=Calibration)
    """Of a model that runs from its file."""


@dataclass(frozen=True, eq=False)
class Made:
    """The result of a job: an output directory's contents, or the smallest budget that can be reached."""

    case: Case
    tensors: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    report: Report | None = None
    least: int | None = None
    files: dict[str, str] = field(default_factory=dict)
    """The task's files, and what tells whether they have changed."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Further files of the directory."""


_LOOKS = 0.5
"""Seconds between two looks at whether the process that a worker works for is still there."""


def end_with(parent: int) -> None:
    """Let this process end soon after the one that it works for, however that ended: nobody else would stop it."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOKS)
        os._exit(1)

    if os.getppid() == parent:
        threading.Thread(target=look, name="end_with", daemon=True).start()


def compress_case(job: Job) -> Made:
    """Do a job, on one thread: the numbers do not depend on how many run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    case = job.case
    try:
        with files_used(apart=job.checkpoint) as files:
            result = converted(job.checkpoint, job.request, job.data)
    except UnreachableError as error:
        return Made(case, least=error.least, files=files)
    finally:
        torch.set_num_threads(threads)
    return Made(case, result.tensors, result.config, result.report, files=files, beside=result.files)

"""What a worker does: one compression, from files to what is to be written. It may run on another machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from htcompress import pipeline
from htcompress.errors import UnreachableError
from htcompress.finetuning.distill import FineTuning
from htcompress.formats import Format
from htcompress.planning import Goal, Scope
from htcompress.report import Report
from htcompress.report.study import Case
from htcompress.study.files import files_used


@dataclass(frozen=True)
class Job:
    """A case with all that it takes; paths are absolute, for a worker may stand elsewhere."""

    case: Case
    checkpoint: str
    task: str
    layers: str
    scope: Scope
    finetuning: FineTuning | None
    seed: int
    device: str


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


def compress_case(job: Job) -> Made:
    """Do a job, on one thread: the numbers do not depend on how many run beside it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    case = job.case
    try:
        with files_used(apart=job.checkpoint) as files:
            result = pipeline.convert(
                job.checkpoint,
                goal=Goal(case.budget, case.error, scope=job.scope, format=Format(case.format)),
                task=job.task,
                layers=job.layers,
                finetuning=job.finetuning,
                seed=job.seed,
                device=job.device,
            )
    except UnreachableError as error:
        return Made(case, least=error.least, files=files)
    finally:
        torch.set_num_threads(threads)
    return Made(case, result.tensors, result.config, result.report, files=files)

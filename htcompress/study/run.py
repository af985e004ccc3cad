"""Running a study: cases in parallel, each kept as soon as it is done, so that an interrupted study goes on."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib

from htcompress.construction import Constructed, DataFile
from htcompress.directory.write import write_directory
from htcompress.errors import CheckpointError, RequestError, UnreachableError
from htcompress.files import write_whole
from htcompress.graphs.calibration import Calibration
from htcompress.numbers import budget_of
from htcompress.observer import Observer
from htcompress.report import Report, read_report
from htcompress.report.html import study_to_html
from htcompress.report.report import RequestValue
from htcompress.report.study import Case, Dense, Point, Study, cases
from htcompress.report.study_views import study_to_markdown
from htcompress.request import FineTuning, Goal, Request
from htcompress.study.files import changed
from htcompress.study.source import anywhere, opened
from htcompress.study.work import Job, Made, compress_case, end_with
from htcompress.vocabulary import Format, Scope, one_of


class Engine(StrEnum):
    """Where the cases run: in processes on this machine, or on the workers of a Dask cluster."""

    LOCAL = "local"
    DASK = "dask"


@dataclass(frozen=True)
class Place:
    """Where and how a study runs.

    Args:
        jobs: processes at a time, each on one thread; None: one for each core.
        engine: `local` or `dask`.
        scheduler: the address of a Dask scheduler (tcp://host:8786); its workers need htcompress, and the files of
            the checkpoint and the task under the same paths.
    """

    jobs: int | None = None
    engine: Engine = Engine.LOCAL
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise RequestError(f"A study needs at least 1 process at a time; found --jobs {self.jobs}.")
        if self.engine is Engine.DASK and self.scheduler is None:
            raise RequestError("The engine dask needs the address of a scheduler: --scheduler tcp://host:8786.")
        if self.engine is Engine.LOCAL and self.scheduler is not None:
            raise RequestError("A scheduler is for the engine dask: add --engine dask, or leave --scheduler out.")

    @contextlib.contextmanager
    def workers(self) -> Iterator[dict[str, Any]]:
        """The arguments of joblib for it; whatever still runs at the end is stopped."""
        if self.engine is Engine.DASK:
            try:
                from distributed import Client
            except ImportError:
                raise RequestError('The engine dask needs dask: pip install "htcompress[dask]".') from None
            try:
                client = Client(self.scheduler, timeout=10)
            except (OSError, ValueError) as error:
                raise RequestError(
                    f"There is no Dask scheduler at {self.scheduler}: {error}. Start one with `dask scheduler`, and "
                    f"workers with `dask worker`."
                ) from error
            with client, joblib.parallel_config(backend="dask"):
                yield {}
            return
        jobs = self.jobs or joblib.cpu_count()
        if jobs == 1:
            yield {"n_jobs": 1}
            return
        try:
            watched = {"initializer": end_with, "initargs": (os.getpid(),)}
            with joblib.parallel_config(backend="loky", inner_max_num_threads=1, **watched):
                yield {"n_jobs": jobs}
        finally:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True, kill_workers=True)


IN_NUMBERS = (Format.HT, Format.TT, Format.TR, Format.BT, Format.SVD)
IN_BYTES = (Format.HT, Format.SVD, Format.DENSE)
"""What is compared at a budget of numbers, and at one of bytes."""


def sweep(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    budgets: Sequence[int | str] = (),
    errors: Sequence[float] = (),
    formats: Sequence[Format | str] = (Format.HT,),
    **options: Any,
) -> Study:
    """Compress a checkpoint to several sizes, in one format or several; what `htcompress sweep` does.

    Args:
        budgets: numbers that the recurrent layers may store, or bytes (`"20kB"`).
        errors: relative errors that every weight matrix keeps to.
        formats: `ht`, `tt`, `tr`, `bt`, `svd`, and `dense`, which only rounds.
        options: those of `study`; `task` is needed.

    Raises `RequestError` where nothing is asked for or a number makes no sense, and what `study` raises.
    """
    if not budgets and not errors:
        raise RequestError("A sweep needs budgets (--budgets 1k,2k,5k) or errors (--errors 0.5,0.2,0.1).")
    return study(checkpoint, directory, _cases(formats, budgets, errors), kind="sweep", **options)


def compare(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    budget: int | str,
    formats: Sequence[Format | str] | None = None,
    **options: Any,
) -> Study:
    """Compress a checkpoint to one size in several formats, all treated alike; what `htcompress compare` does.

    By default a budget of numbers is given to all that factor, one of bytes to HT, to truncated SVD and to rounding.

    Every format is weighted by the same data, refined in the same metric, given one budget over all matrices and
    fine-tuned by the same steps. Arguments and errors are those of `sweep`.
    """
    if formats is None:
        formats = IN_NUMBERS if budget_of(budget, "budget")[1] is None else IN_BYTES
    return study(checkpoint, directory, _cases(formats, [budget], []), kind="compare", **options)


def study(
    checkpoint: str | Path,
    directory: str | Path,
    asked: Sequence[Case],
    *,
    kind: str,
    task: str | Path | None = None,
    model: str | None = None,
    model_arguments: Mapping[str, Any] | None = None,
    calibration: str | Path | None = None,
    targets: str | None = None,
    metric: str | None = None,
    layers: str = "*",
    weights: str | None = None,
    names: Mapping[str, str] | None = None,
    scope: Scope | str = Scope.AUTO,
    finetuning: FineTuning | None = None,
    seed: int = 0,
    device: str = "cpu",
    place: Place | None = None,
    observer: Observer | None = None,
) -> Study:
    """Compress a checkpoint once for every case, and measure the results side by side.

    Each point is an output directory of its own under `directory/points`, written when it is done. A study that is
    started again in the same directory takes over the points that were asked for alike, and repeats nothing.

    Args:
        checkpoint, task, model, model_arguments, calibration, targets, metric: as for `htcompress.convert`.
        layers, weights, names, scope, finetuning, seed, device: likewise.
        directory: where the study is written: `study.json`, `study.md` and the points.
        kind: `sweep` or `compare`.
        place: where it runs; by default in a process for each core.

    Raises:
        RequestError: the directory holds something else.
        UnreachableError: none of the cases can be reached.
        HTCompressError: as `htcompress.convert`.
    """
    observer, folder = observer or Observer(), Path(directory)
    check_free(folder)
    scope = one_of(Scope, scope, "--scope")
    arguments = None if model_arguments is None else json.dumps(dict(model_arguments))
    words = None if calibration is None else str(calibration), targets, metric
    constructed, named = Constructed.of_options(model, arguments, *words), None if task is None else str(task)
    plain = Request(
        Goal(budget=1, scope=scope), layers, finetuning, seed, named, weights, device, names, model=constructed
    )
    given = Calibration(None if calibration is None else Path(calibration), targets, metric)
    source = opened(checkpoint, plain, given, observer)
    where = str(Path(checkpoint).resolve())
    request, data = anywhere(plain, given if constructed is None else Calibration())
    jobs = [Job(case, where, replace(request, goal=case.goal(scope)), data) for case in asked]
    alone = constructed is None and calibration is not None
    typed = replace(plain, data=DataFile(str(calibration), targets, metric) if alone else None)
    points = _Points(folder / "points", str(checkpoint), typed.to_report(), {"model": str(source.sha256)})
    _run([job for job in jobs if points.missing(job)], points, len(jobs), place or Place(), observer)
    found = [points.point(job) for job in jobs]
    reports = {case.name: points.report(case) for case in asked if points.report(case) is not None}
    if not reports:
        least, unit = min(
            (point.least, "" if point.case.bytes is None else "B") for point in found if point.least is not None
        )
        raise UnreachableError(
            f"None of the budgets can be reached; the smallest that can is {least}{unit}.", least=least
        )
    first = next(report for report in reports.values() if report is not None)
    observer.stage("measuring latencies")
    measured, said = source.latencies(points.folder, list(reports))
    told: dict[str, RequestValue] = {
        "task": named,
        **({} if constructed is None else {"model": constructed.command()}),
        "layers": layers,
        "scope": scope.value,
        "steps": 0 if finetuning is None else finetuning.steps,
        "epochs": None if finetuning is None else finetuning.epochs,
        "seed": seed,
    }
    made = Study(
        kind,
        version("htcompress"),
        {"file": source.file, "sha256": source.sha256},
        told,
        first.quality.metric,
        first.quality.higher_is_better,
        said,
        Dense(first.totals.parameters_before, first.totals.bytes_before, first.quality.dense, measured.get("dense")),
        tuple(replace(point, latency_ms=measured.get(point.case.name)) for point in found),
    )
    write_whole(folder / "study.json", made.to_json())
    write_whole(folder / "study.md", study_to_markdown(made))
    write_whole(folder / "study.html", study_to_html(made))
    return made


def check_free(folder: Path) -> None:
    """Raise `RequestError` where a study could not be written, before any work is done."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"The output {folder} is a file; give a directory with -o.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "points").is_dir():
        raise RequestError(
            f"The output directory {folder} exists and is no study of htcompress, so it is left as it is. Give another "
            f"with -o."
        )


def _cases(formats: Sequence[Format | str], budgets: Sequence[int | str], errors: Sequence[float]) -> list[Case]:
    named = [one_of(Format, form, "--formats").value for form in formats]
    sizes = [budget_of(budget, "a budget") for budget in budgets]
    numbers = [count for count, _ in sizes if count is not None]
    stored = [size for _, size in sizes if size is not None]
    for case in (found := cases(named, budgets=numbers, errors=errors, bytes=stored)):
        case.goal(Scope.AUTO)  # which says what is wrong with a number
    return found


@dataclass(frozen=True)
class _Points:
    """The finished cases of a study, each an output directory with a note of what it was made from."""

    folder: Path
    checkpoint: str
    words: dict[str, Any]
    made_from: dict[str, str]

    def missing(self, job: Job) -> bool:
        """Whether a job is yet to be done, as it is asked for now, of the files as they are now."""
        note = self._note(job.case)
        return note.get("job") != self._asked(job) or changed(note.get("files", {}))

    def add(self, job: Job, made: Made) -> None:
        """Keep what a job has made: its directory first, then the note that makes it count."""
        case = job.case
        if made.report is not None:
            place = self.folder / case.name
            source = {**made.report.source, "path": os.path.relpath(self.checkpoint, place)}
            # Paths as the user has typed them.
            request = {**made.report.request, **{name: self.words.get(name) for name in ("task", "model", "data")}}
            report = replace(made.report, source=source, request=request)
            write_directory(place, made.tensors or {}, made.config or {}, report, files=made.beside)
        self.folder.mkdir(parents=True, exist_ok=True)
        note = {"job": self._asked(job), "least": made.least, "files": made.files}
        write_whole(self.folder / f"{case.name}.json", json.dumps(note, indent=1) + "\n")

    def report(self, case: Case) -> Report | None:
        """The report of a case; None where its budget cannot be reached."""
        return None if self._note(case).get("least") is not None else read_report(self.folder / case.name)

    def point(self, job: Job) -> Point:
        """What came of a case."""
        report = self.report(job.case)
        return Point(job.case, least=self._note(job.case)["least"]) if report is None else Point.of(job.case, report)

    def _note(self, case: Case) -> dict[str, Any]:
        try:
            note = json.loads((self.folder / f"{case.name}.json").read_text(encoding="utf-8"))
            if note["least"] is None:
                read_report(self.folder / case.name)
            return dict(note)
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            return {}

    def _asked(self, job: Job) -> dict[str, Any]:
        asked = job.request.to_report()
        del asked["task"], asked["device"], asked["data"]
        if asked.pop("model") is not None:
            # Files are told by what is in them.
            asked["class"] = {**self.words["model"], "calibration": None}
        if job.data.file is not None:
            asked |= {"targets": job.data.targets, "metric": job.data.metric}
        asked |= {"seed": job.request.seed, **self.made_from, "version": version("htcompress")}
        return dict(json.loads(json.dumps(asked)))


def _run(jobs: Sequence[Job], points: _Points, total: int, place: Place, observer: Observer) -> None:
    """Do the jobs, and keep each as it comes."""
    done = total - len(jobs)
    observer.stage("compressing", total)
    if done:
        observer.message(f"{done} of {total} points are there already.")
    if not jobs:
        return
    by_case = {job.case: job for job in jobs}
    with place.workers() as options:
        parallel = joblib.Parallel(return_as="generator_unordered", **options)
        for made in parallel(joblib.delayed(compress_case)(job) for job in jobs):
            points.add(by_case[made.case], made)
            done += 1
            observer.advance(done, made.case.name)
            observer.message(f"{done} of {total}: {_told(made)}")


def _told(made: Made) -> str:
    if made.report is None:
        unit = "" if made.case.bytes is None else "B"
        return f"{made.case.name} cannot be reached; the smallest budget is {made.least}{unit}."
    q = made.report.quality
    quality = "" if q.final is None else f", {q.metric} {q.final:.4f}"
    return f"{made.case.name} stores {made.report.totals.parameters_after:,} numbers{quality}."

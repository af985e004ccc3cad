"""Reports held against limits: what was found, by how much it misses, what to do about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from htcompress.checks.config import Target
from htcompress.checks.limits import Limit, Rule, Unit, output_errors, parse_limit
from htcompress.errors import HTCompressError, RequestError
from htcompress.report import words
from htcompress.report.report import Report, read_report, report_file


@dataclass(frozen=True)
class Check:
    """One limit, held against a report.

    `bound` is the most (`most`) or the least that `found` may be; it is the limit itself, except where the limit is a
    change against `baseline`. `miss` is by how much `found` is beyond it, 0 where it holds; `advice` is empty there.
    """

    limit: Limit
    found: float
    bound: float
    most: bool
    miss: float
    advice: str = ""
    baseline: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the limit holds."""
        return self.miss == 0


@dataclass(frozen=True)
class Verdict:
    """A target's checks, failures first; `problems` are limits that could not be looked at, and why."""

    target: Target
    checks: tuple[Check, ...]
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything was looked at and holds."""
        return not self.problems and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)


def check(report: Path | str, *, baseline: Path | str | None = None, **limits: float | str) -> Verdict:
    """Hold a report against limits, as `htcompress check` does.

    ```python
    verdict = htcompress.check("model-ht", max_parameters=5000, max_drop=0.01)
    assert verdict.passed, [check.advice for check in verdict.failures]
    ```

    Args:
        report: a report.json, or the output directory it is in.
        baseline: an earlier one, for the limits whose names end in `_change`.
        limits: values by name, see `htcompress.checks.RULES`.

    Raises `RequestError` where limits make no sense, are missing, or need something that was not measured;
    `CheckpointError` where there is no report.
    """
    parsed = tuple(parse_limit(name, value) for name, value in limits.items())
    target = Target(Path(report), parsed, None if baseline is None else Path(baseline))
    verdict = _judged(target)
    if verdict.problems:
        raise RequestError(" ".join(verdict.problems))
    return verdict


def judge(targets: Sequence[Target]) -> tuple[Verdict, ...]:
    """The verdict on each target; what cannot be looked at is among its problems, and the others go on."""
    found = []
    for target in targets:
        try:
            found.append(_judged(target))
        except HTCompressError as error:
            found.append(Verdict(target, (), (str(error),)))
    return tuple(found)


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """0 where all limits hold, 1 where one fails, 2 where something, or all, could not be looked at."""
    if not verdicts or any(verdict.problems for verdict in verdicts):
        return 2
    return 0 if all(verdict.passed for verdict in verdicts) else 1


def _judged(target: Target) -> Verdict:
    report = read_report(target.report)
    earlier = None
    if target.baseline is not None:
        if report_file(target.baseline).resolve() == report_file(target.report).resolve():
            raise RequestError(
                f"{target.baseline} is the report that is checked; a baseline is an earlier one. Keep a copy of the "
                f"report.json that changes are measured against."
            )
        earlier = read_report(target.baseline)
    checks, problems = [], []
    for limit in target.limits:
        try:
            checks.append(_held(limit, report, earlier, target))
        except RequestError as error:
            problems.append(str(error))
    return Verdict(target, tuple(sorted(checks, key=lambda check: check.passed)), tuple(problems))


def _held(limit: Limit, report: Report, earlier: Report | None, target: Target) -> Check:
    rule = limit.rule
    _meaningful(limit, report, target.report)
    found = _measured(rule, report, target.report)
    most = rule.most
    if not rule.change:
        bound, base = limit.value, None
    else:
        if earlier is None or target.baseline is None:
            raise RuntimeError(f"{rule.name} was to be held against a baseline that was not read.")
        base = _measured(rule, earlier, target.baseline)
        if rule.quantity == "metric":
            _comparable(report, earlier, target.baseline)
            most = not report.quality.higher_is_better
        allowed = limit.value * abs(base) if limit.share else limit.value
        bound = base + allowed if most else base - allowed
    miss = found - bound if most else bound - found
    # 0.95 - 0.94 is not beyond 0.01.
    if miss <= 0 or math.isclose(found, bound, rel_tol=1e-9, abs_tol=1e-12):
        return Check(limit, found, bound, most, 0.0, baseline=base)
    return Check(limit, found, bound, most, miss, _advice(rule, bound, report), base)


def _measured(rule: Rule, report: Report, place: Path) -> float:
    found = rule.read(report)
    if found is not None and math.isfinite(found):
        return found
    if rule.quantity == "output_error":
        unknown = [name for name, error in output_errors(report).items() if error is None]
        raise RequestError(
            f"{rule.name}: {place} does not tell the output error of {unknown[0]}: it was converted without "
            f"calibration data. Convert again with --task."
        )
    q = report.quality
    if q.metric is None:
        raise RequestError(
            f"{rule.name}: {place} has no metric, for it was converted without a task. Convert again with --task, or "
            f"run htcompress finetune with one."
        )
    lacking = "the dense model" if q.final is not None else "the compressed model"
    raise RequestError(
        f"{rule.name}: {place} does not tell the {q.metric} of {lacking}. Convert again with a task whose evaluate() "
        f"gives a finite number."
    )


def _meaningful(limit: Limit, report: Report, place: Path) -> None:
    """Raises `RequestError` where a limit is on the wrong side of a metric, or cannot fail."""
    name, q = limit.rule.name, report.quality
    if q.metric is None:
        return
    if name == "min_metric" and not q.higher_is_better:
        raise RequestError(f"min_metric: of {q.metric} lower is better ({place}); use max_metric.")
    if name == "max_metric" and q.higher_is_better:
        raise RequestError(f"max_metric: of {q.metric} higher is better ({place}); use min_metric.")
    values = [value for value in (q.dense, q.final) if value is not None]
    between = q.higher_is_better and bool(values) and all(0 <= value <= 1 for value in values)
    if name == "max_drop" and between and limit.value >= 1:
        raise RequestError(
            f"max_drop: a drop of {limit.value:g} could not happen to {q.metric}, which is between 0 and 1 ({place}). "
            f"It is absolute: write 0.01 for one point of a hundred."
        )


def _comparable(report: Report, earlier: Report, baseline: Path) -> None:
    now, then = report.quality, earlier.quality
    if (now.metric, now.higher_is_better) != (then.metric, then.higher_is_better):
        raise RequestError(
            f"max_metric_change: the baseline {baseline} measured {then.metric}, this report {now.metric}; they do not "
            f"compare. Take a baseline with the same task."
        )


def _advice(rule: Rule, bound: float, report: Report) -> str:
    """What brings the quantity within its bound."""
    q = report.quality
    if rule.quantity == "parameters":
        return f"Convert again with --budget {math.floor(bound)}."
    if rule.quantity == "bytes":
        return f"Convert again with --budget {math.floor(bound)}B."
    if rule.quantity == "ratio":
        return f"Convert again with --ratio {bound:g}."
    if rule.quantity == "macs":
        return "Convert again with a smaller --budget; htcompress sweep shows what it costs in accuracy."
    if rule.quantity == "output_error":
        name, error = max(output_errors(report).items(), key=lambda item: item[1] or 0)
        return f"{name} loses {words.percent(error)} of its output. Convert again with a larger --budget."
    if rule.unit is Unit.METRIC and q.finetuned is None:
        return "It was not fine-tuned: run htcompress finetune, or convert without --no-finetune."
    if rule.name == "min_metric" and q.dense is not None and q.dense < bound:
        return f"The dense model itself has {words.metric(q.dense)}: train it further, or lower the limit."
    if rule.name == "max_metric" and q.dense is not None and q.dense > bound:
        return f"The dense model itself has {words.metric(q.dense)}: train it further, or raise the limit."
    return "More --steps of fine-tuning or a larger --budget; htcompress sweep shows the trade-off."

"""The report and a study as pages: each one self-contained file, for a screen, a phone or paper."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from htcompress.report import plots, study_views, words
from htcompress.report.report import MatrixReport, Report
from htcompress.report.study import Study
from htcompress.request import Request

if TYPE_CHECKING:
    from jinja2 import Environment

_DRAWN = 24  # matrices


def to_html(report: Report) -> str:
    """The report as an HTML page that needs nothing else."""
    factored = [m for layer in report.layers for m in layer.matrices if m.ranks]
    shown = factored[:_DRAWN]
    spectra = [(m.name, plots.spectrum(m)) for m in shown]
    trees = [(m.name, plots.tree(m)) for m in shown]
    times = [(name, seconds) for name, seconds in vars(report.timings_s).items() if seconds is not None]

    def share(matrix: MatrixReport) -> str:
        return f"{100 * matrix.parameters / max(report.totals.parameters_after, 1):.1f}"

    return _page(
        "report.html",
        version=report.version,
        report=report,
        cards=_cards(report),
        notes=words.notes(report),
        trade_off=plots.trade_off(report),
        share=share,
        spectra=[(name, drawing) for name, drawing in spectra if drawing is not None],
        trees=[(name, drawing) for name, drawing in trees if drawing is not None],
        drawn=len(factored),
        command=command(report),
        times=", ".join(f"{name} {seconds:.1f}" for name, seconds in times),
    )


def study_to_html(study: Study) -> str:
    """The study as an HTML page that needs nothing else; its points link to their reports beside it."""
    return _page(
        "study.html",
        version=study.version,
        study=study,
        title=study_views.TITLES[study.kind],
        notes=study_views.notes(study),
        curve=plots.curve(study),
        heads=study_views.heads(study),
        rows=[
            {
                "cells": row.cells,
                "best": row.best,
                "link": None if row.name is None else f"points/{row.name}/report.html",
            }
            for row in study_views.rows(study)
        ],
        made_by=study_views.made_by(study),
    )


def command(report: Report) -> str:
    """What to type, or to call, to get the same again."""
    request, file = Request.of_report(report.request, seed=report.seed), str(report.source["file"])
    if report.source.get("path") is not None:
        return request.command(file)
    asked = {
        "budget": request.goal.budget if request.goal.bytes is None else f"{request.goal.bytes}B",
        "error": request.goal.error,
        "ratio": request.goal.ratio,
    }
    goal = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value is not None)
    return f"htcompress.compress({file}(...), {goal}, seed={report.seed})"


def _cards(report: Report) -> list[dict[str, str]]:
    t, q, latency = report.totals, report.quality, report.latency
    cards = [
        _card("RNN parameters", words.count, t.parameters_before, t.parameters_after),
        _card("RNN size", words.size, t.bytes_before, t.bytes_after),
    ]
    if q.metric is not None:
        note = "" if q.finetuned is None else f"before fine-tuning: {words.metric(q.decomposed)}"
        cards.insert(
            0,
            {
                "name": q.metric,
                "before": words.metric(q.dense),
                "after": words.metric(q.final),
                "change": words.change(q),
                "mood": "bad" if words.worse(q) else "good",
                "note": note,
            },
        )
    if latency is not None:
        cards.append(
            {
                "name": "latency",
                "before": f"{words.milliseconds(latency.dense_ms)} ms",
                "after": f"{words.milliseconds(latency.compressed_ms)} ms",
                "change": _faster(latency.dense_ms, latency.compressed_ms),
                "mood": "good" if latency.compressed_ms <= latency.dense_ms else "bad",
                "note": "",
            }
        )
    cards.append(_card("multiplications per step", words.count, t.macs_per_step_before, t.macs_per_step_after))
    cards.append(_card("model parameters", words.count, t.model_parameters_before, t.model_parameters_after))
    return cards


def _card(name: str, write: Any, before: int, after: int) -> dict[str, str]:
    mood = "good" if after <= before else "bad"
    change = words.ratio(before, after)
    return {"name": name, "before": write(before), "after": write(after), "change": change, "mood": mood, "note": ""}


def _faster(before: float, after: float) -> str:
    return words.ratio(before, after).replace("smaller", "faster").replace("larger", "slower")


def _page(template: str, **values: Any) -> str:
    style = (resources.files("htcompress.report") / "templates" / "style.css").read_text(encoding="utf-8")
    return _templates().get_template(template).render(words=words, style=style, **values)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("htcompress.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

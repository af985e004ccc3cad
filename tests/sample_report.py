"""A report made by hand: every kind of matrix, every stage, and names that try the tables."""

from __future__ import annotations

from dataclasses import asdict

from htcompress.nn.settings import RecurrentSettings
from htcompress.report import Latency, LayerReport, MatrixReport, Quality, Report, Timings, Totals
from htcompress.request import FineTuning
from htcompress.vocabulary import Kind

SPLIT = MatrixReport(
    name="encoder.rnn.l0",
    shape=(1024, 57857),
    layout="split",
    row_modes=(4, 16, 16, 1, 1, 1),
    col_modes=(1, 1, 1, 120, 161, 3),
    tree=[[0, [1, 2]], [[3, 4], 5]],
    ranks={
        "0": 4,
        "1": 8,
        "2": 8,
        "1+2": 8,
        "0+1+2": 12,
        "3": 9,
        "4": 9,
        "3+4": 10,
        "5": 3,
        "3+4+5": 12,
        "0+1+2+3+4+5": 1,
    },
    parameters=6890,
    error={"weights": 0.931, "outputs": 0.0871},
    kept_dense=False,
    spectrum=(1.0, 0.71, 0.4, 0.33, 0.29, 0.2, 0.14, 0.1, 0.071, 0.05, 0.031, 0.02, 0.012, 0.009, 0.004, 0.0),
)
SVD = MatrixReport(
    name="encoder.rnn.l1.ih",
    shape=(1024, 256),
    layout="svd",
    row_modes=(1024, 1),
    col_modes=(1, 256),
    tree=[0, 1],
    ranks={"0": 3, "1": 3, "0+1": 1},
    parameters=3840,
    error={"weights": 0.612345, "outputs": 1.2e-05},
    kept_dense=False,
)
PAIRED = MatrixReport(
    name="encoder.rnn.l1.hh",
    shape=(1024, 256),
    layout="paired",
    row_modes=(4, 8, 8, 4),
    col_modes=(4, 4, 4, 4),
    tree=[[0, 1], [2, 3]],
    ranks={"0": 5, "1": 6, "0+1": 7, "2": 6, "3": 5, "2+3": 7, "0+1+2+3": 1},
    parameters=1022,
    error={"weights": 1.0, "outputs": 0.5},
    kept_dense=False,
)
DENSE = MatrixReport(
    name="decoder.layers.0.attention_rnn.cell.hh",
    shape=(60, 20),
    layout="dense",
    row_modes=(),
    col_modes=(),
    tree=[],
    ranks={},
    parameters=1200,
    error={"weights": 0.0, "outputs": 0.0},
    kept_dense=True,
)

LSTM = RecurrentSettings(Kind.LSTM, 57600, 256, num_layers=2, batch_first=True)
CELL = RecurrentSettings(Kind.GRU, 0, 20, cell=True)


def sample_report() -> Report:
    lstm = LayerReport(
        name="encoder.rnn",
        kind="lstm",
        settings=LSTM.to_config(),
        parameters_before=59_773_952,
        parameters_after=13_800,
        scope="mixed",
        matrices=(SPLIT, SVD, PAIRED),
        units_reordered=True,
    )
    cell = LayerReport(
        name="decoder.layers.0.attention_rnn",
        kind="gru",
        settings=CELL.to_config(),
        parameters_before=1_320,
        parameters_after=1_280,
        scope=None,
        matrices=(DENSE,),
    )
    totals = Totals(
        parameters_before=59_775_272,
        parameters_after=15_080,
        ratio=3963.9,
        bytes_before=239_101_088,
        bytes_after=60_320,
        macs_per_step_before=59_770_064,
        macs_per_step_after=965_248,
        model_parameters_before=59_800_000,
        model_parameters_after=39_808,
    )
    quality = (
        Quality()
        .with_stage("dense", {"accuracy": 0.9375, "loss": 0.21}, higher_is_better=True)
        .with_stage("decomposed", {"accuracy": 0.8125, "loss": 0.63}, higher_is_better=True)
        .with_stage("finetuned", {"accuracy": 0.965, "loss": 0.17}, higher_is_better=True)
    )
    return Report(
        version="0.1.0",
        source={"file": "model.pt", "sha256": "0123456789abcdef" * 4, "path": "../model.pt"},
        seed=0,
        request={
            "budget": 15_100,
            "error": None,
            "ratio": None,
            "scope": "auto",
            "layout": "auto",
            "format": "ht",
            "unit_order": "auto",
            "bits": 32,
            "bytes": None,
            "task": "task.py",
            "layers": "*",
            "weights": None,
            "device": "cpu",
            "names": None,
            "model": None,
            "data": None,
            "steps": 400,
            "time_limit": None,
            "epochs": None,
            "finetuning": asdict(FineTuning()),
        },
        totals=totals,
        layers=(lstm, cell),
        quality=quality,
        timings_s=Timings(1.25, 3.5, 12.0, 0.75),
        frontier=((4_200, 0.91), (6_000, 0.62), (8_800, 0.31), (12_000, 0.16), (15_080, 0.0912)),
        latency=Latency(118.25, 3.91, "one call of the model, a batch of the task's, 1 thread on a CPU"),
    )

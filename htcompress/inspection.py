"""What a checkpoint holds: its recurrent layers, their spectra, what a few sizes would lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor

from htcompress.errors import CheckpointError
from htcompress.graphs.file import OnnxFile
from htcompress.graphs.formats import container_of, refuse_names
from htcompress.matrix.blocks import chunked_gram, working
from htcompress.model.inventory import inventory, names_of, place_of
from htcompress.model.reparametrised import plain_tensors
from htcompress.model.selection import selected
from htcompress.nn.dense import DenseLayer
from htcompress.nn.settings import RecurrentSettings
from htcompress.report import words
from htcompress.sources.keras_file import KerasFile
from htcompress.sources.naming import has_recurrent
from htcompress.sources.read import read_checkpoint
from htcompress.sources.recognise import Container

SHARES = (0.5, 0.25, 0.1, 0.01)
"""The parts of the present parameters that an inspection looks at."""


@dataclass(frozen=True)
class MatrixInspection:
    """A weight matrix: its shape, the ranks that keep a relative error, and its spectrum.

    `spectrum` has the singular values divided by the largest; `ranks` maps a relative error to the rank
    that a truncated SVD needs for it.
    """

    name: str
    shape: tuple[int, int]
    ranks: dict[str, int]
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class LayerInspection:
    """A recurrent layer as found."""

    name: str
    kind: str
    settings: dict[str, Any]
    parameters: int
    matrices: tuple[MatrixInspection, ...]


@dataclass(frozen=True)
class Outlook:
    """What truncated SVD, the floor of every conversion, loses of the weights at a number of parameters."""

    budget: int
    share: float
    weight_error: float | None
    """None: too few numbers for rank one everywhere; tensor layouts go further."""


_UNROLLED = "has a recurrent layer's weights, and no LSTM, GRU or RNN node: it was unrolled when it was exported"


@dataclass(frozen=True)
class Inspection:
    """The recurrent layers of a checkpoint; `left` names those that cannot be compressed as they are, and why.

    `others` are further state_dicts of the file, `note` is what is to be known of it.
    """

    file: str
    parameters: int
    rnn_parameters: int
    layers: tuple[LayerInspection, ...]
    outlook: tuple[Outlook, ...]
    left: dict[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The inspection as JSON values."""
        return asdict(self)


def inspect_checkpoint(
    path: str | Path, *, layers: str = "*", weights: str | None = None, names: Mapping[str, str] | None = None
) -> Inspection:
    """Look at a checkpoint without changing anything. Arguments and errors: those of `read_checkpoint`, `inventory`."""
    left: dict[str, str] = {}
    nodes: set[str] | None = None
    told: dict[str, RecurrentSettings] = {}
    container = container_of(path)
    if container is Container.ONNX:
        refuse_names(path, names)
        file = OnnxFile.read(Path(path))
        read = file.checkpoint()
        left |= file.left
        nodes = {node.layer for node in file.nodes}
        told = {node.name: node.settings for node in file.nodes}
        if left and not nodes:
            raise _none(path, left)
        if not nodes and not has_recurrent(read.tensors):
            raise CheckpointError(
                f"{path} has no recurrent layers: there is no LSTM, GRU or RNN node in it, and no cell that was "
                f"unrolled. htcompress compresses those."
            )
    elif container is not None and weights is None and not names:
        # A whole model of Keras, whose layers may be what weights alone do not tell.
        model = KerasFile.read(Path(path))
        read = model.checkpoint()
        left |= read.left
        told = {layer.name: layer.settings for layer in model.layers}
        if left and not told:
            raise _none(path, left)
    else:
        read = read_checkpoint(path, weights=weights, names=names)
        left |= read.left
    read = replace(read, tensors=plain_tensors(read.tensors))
    every = inventory(read.tensors, source=str(path), on_left=left.__setitem__)
    if nodes is not None:
        named = nodes | set(left)
        left |= {layer.name: _UNROLLED for layer in every if layer.name.replace(".", "_") not in named}
        every = [layer for layer in every if layer.name in nodes]
        if left and not every:
            raise _none(path, left)
    chosen = selected({layer.name: names_of(layer, read.tensors) for layer in every}, layers)
    found = [layer for layer in every if layer.name in chosen]
    spectra: list[tuple[tuple[int, int], Tensor]] = []
    inspected = []
    for layer in found:
        matrices = []
        for name, matrix in _matrices(layer):
            values = _singular_values(matrix)
            spectra.append(((matrix.shape[0], matrix.shape[1]), values))
            matrices.append(_matrix(name, matrix, values))
        settings = told.get(layer.name, layer.settings)
        inspected.append(
            LayerInspection(
                layer.name, settings.kind.value, settings.to_config(), settings.dense_parameters, tuple(matrices)
            )
        )
    total = sum(layer.settings.dense_parameters for layer in found)
    biases = sum(direction.biases for layer in found for direction in layer.directions.values())
    outlook = tuple(
        Outlook(int(total * share), share, _svd_error(spectra, int(total * share) - biases)) for share in SHARES
    )
    # What several names share is there once.
    distinct = {place_of(t) or name: t.numel() for name, t in read.tensors.items() if t.numel()}
    numbers = sum(distinct.values())
    return Inspection(read.path.name, numbers, total, tuple(inspected), outlook, left, read.others, read.note)


def _none(path: str | Path, left: Mapping[str, str]) -> CheckpointError:
    return CheckpointError(f"None of the recurrent layers of {path} can be compressed. {' '.join(words.left(left))}")


def inspection_to_terminal(found: Inspection) -> RenderableType:
    """The inspection as something rich can print, 80 columns wide."""
    head = Text.assemble(
        (found.file, "bold cyan"),
        f": {len(found.layers)} recurrent layer{'s' * (len(found.layers) != 1)}, "
        f"{words.count(found.rnn_parameters)} of {words.count(found.parameters)} parameters "
        f"({words.percent(found.rnn_parameters / max(1, found.parameters))})",
    )
    tables: list[RenderableType] = []
    for index, layer in enumerate(found.layers):
        title = Text.assemble((layer.name or "(top level)", "bold"), f"  {words.layer(layer.settings)}")
        table = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False, width=78)
        table.add_column("matrix", overflow="fold", ratio=1)
        table.add_column("shape", justify="right", no_wrap=True)
        table.add_column("numbers", justify="right")
        table.add_column("singular values", no_wrap=True)
        table.add_column("rank for\n10 % error", justify="right", no_wrap=True)
        table.add_column("rank for\n1 % error", justify="right", no_wrap=True)
        for m in layer.matrices:
            rows, cols = m.shape
            table.add_row(
                m.name.removeprefix(layer.name + "."),
                f"{rows}×{cols}",
                words.count(rows * cols),
                _sparkline(m.spectrum),
                str(m.ranks["0.1"]),
                str(m.ranks["0.01"]),
            )
        # A table ends with an empty line of its own.
        tables += [Padding(title, (int(index == 0), 1, 0, 1)), Padding(table, (0, 1))]
    outlook = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    outlook.add_column("--budget", justify="right")
    outlook.add_column("of the RNN", justify="right")
    outlook.add_column("weights lost by truncated SVD", justify="right")
    for o in found.outlook:
        lost = "too small for it" if o.weight_error is None else words.percent(o.weight_error)
        outlook.add_row(words.count(o.budget), f"{100 * o.share:g} %", lost)
    note = Text(
        "Lost weights say little about lost accuracy: convert with --task weighs them by data and fine-tunes, and is "
        "never worse than truncated SVD at the same size.",
        style="dim",
    )
    remarks = words.left(found.left)
    rest = words.elsewhere(found.rnn_parameters, found.parameters)
    remarks += [] if rest is None else [rest]
    remarks += [found.note] if found.note else []
    if found.others:
        remarks.append(f"The file also holds {', '.join(found.others)}; look at those weights with --weights.")
    notes = [Padding(Text(remark, style="yellow"), (0, 2)) for remark in remarks]
    return Group(Padding(head, (0, 1)), *tables, *notes, Padding(outlook, (0, 1)), Padding(note, (0, 2)))


def _matrices(layer: DenseLayer) -> list[tuple[str, Tensor]]:
    found = []
    for direction, dense in layer.directions.items():
        own = f"{layer.name}.{direction}" if layer.name else direction
        found += [(f"{own}.ih", dense.ih), (f"{own}.hh", dense.hh)]
        if dense.hr is not None:
            found.append((f"{own}.hr", dense.hr))
    return found


def _matrix(name: str, matrix: Tensor, values: Tensor) -> MatrixInspection:
    tails = values.square().flip(0).cumsum(0).flip(0)
    scale = float(values[0]) or 1.0
    ranks = {str(e): int((tails > e**2 * float(tails[0])).sum()) for e in (0.5, 0.1, 0.01)}
    shown = tuple(round(float(v) / scale, 6) for v in values)
    return MatrixInspection(name, (matrix.shape[0], matrix.shape[1]), ranks, shown)


def _singular_values(matrix: Tensor) -> Tensor:
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return torch.linalg.eigvalsh(chunked_gram(working(wide))).flip(0).clamp_min(0).sqrt()


def _svd_error(spectra: Sequence[tuple[tuple[int, int], Tensor]], budget: int) -> float | None:
    """The relative error of the best truncated SVDs that share a budget: rank one, then greedy by gain per number."""
    total = sum(float(values.square().sum()) for _, values in spectra)
    used = sum(rows + cols for (rows, cols), _ in spectra)
    kept = sum(float(values[0]) ** 2 for _, values in spectra)
    if used > budget:
        return None
    steps = sorted(
        ((float(v) ** 2 / (rows + cols), rows + cols) for (rows, cols), values in spectra for v in values[1:]),
        reverse=True,
    )
    for rate, cost in steps:
        if used + cost <= budget:
            used, kept = used + cost, kept + rate * cost
    return float((max(0.0, total - kept) / total) ** 0.5) if total else 0.0


def _sparkline(values: Sequence[float], width: int = 14) -> str:
    blocks = "▁▂▃▄▅▆▇█"
    picked = [values[int(i * (len(values) - 1) / max(1, width - 1))] for i in range(min(width, len(values)))]
    return "".join(blocks[min(7, int(v * 8))] for v in picked)

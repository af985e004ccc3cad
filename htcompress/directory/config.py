"""What config.json holds, as types: read by msgspec, and published as a JSON Schema.

Types say what a value is; `structure.py` says what values mean together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from htcompress.nn.settings import RecurrentSettings

Made = TypeVar("Made")

MOST_UNITS = 1 << 24
"""The units, inputs, rows or columns that a matrix may have."""

MOST_LEAVES = 64
"""The leaves of a dimension tree."""

MOST_PADDING = 16
"""How many times its rows or columns the modes of a matrix may hold."""

Size = Annotated[int, Meta(ge=0, le=2 * MOST_UNITS + 2)]
"""Rows or columns: the columns of a joint matrix are inputs, units and biases beside each other."""

Mode = Annotated[int, Meta(ge=1, le=MOST_PADDING * MOST_UNITS)]
Modes = Annotated[tuple[Mode, ...], Meta(min_length=1, max_length=MOST_LEAVES)]
Rank = Annotated[int, Meta(ge=1, le=1 << 36)]
Words = Annotated[int, Meta(ge=0, le=MOST_UNITS)]


class LayoutConfig(msgspec.Struct, frozen=True):
    """A folding: `rows` x `cols` as leaves with a row and a column mode each, under a binary `tree` of pairs."""

    rows: Size
    cols: Size
    row_modes: Modes
    col_modes: Modes
    tree: Any


class MatrixConfig(msgspec.Struct, frozen=True):
    """A matrix in one of the forms: `dense` has a shape, all others a layout and the ranks of its edges."""

    form: str
    shape: tuple[Size, Size] | None = None
    layout: LayoutConfig | None = None
    ranks: tuple[Rank, ...] | None = None


class CodecConfig(msgspec.Struct, frozen=True):
    """How one tensor is stored: the codec, and whether each of its rows has a scale of its own."""

    name: str
    by_rows: bool = False


class DirectionConfig(msgspec.Struct, frozen=True):
    """The matrices of one direction: `joint`, or `ih` and `hh`; `hr` is a projection.

    `order` counts words. With `input_exponents` inputs are read times powers of two, which are stored.
    """

    biases: tuple[Literal["bias", "bias_hn"], ...]
    joint: MatrixConfig | None = None
    ih: MatrixConfig | None = None
    hh: MatrixConfig | None = None
    hr: MatrixConfig | None = None
    order: Words | None = None
    input_exponents: bool = False
    codecs: dict[str, CodecConfig] = {}


class LayerConfig(msgspec.Struct, frozen=True):
    """One recurrent module: torch's arguments, and its directions by name.

    `also` are further names of the same module, `assumed` the settings that nobody told, `units` the order in which
    hidden units stand in the whole model where it is another than the dense model's.
    """

    settings: RecurrentSettings
    weights: dict[str, DirectionConfig]
    also: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    units: dict[str, tuple[int, ...]] = {}


class Config(msgspec.Struct, frozen=True):
    """The file: compressed layers by module name, tied tensors, and state that is no tensor.

    `shared` are the names of weights that were one tensor in the dense model, and may be several now.
    """

    format: str
    layers: dict[str, LayerConfig]
    aliases: dict[str, str] = {}
    extra: dict[str, Any] = {}
    shared: tuple[tuple[str, ...], ...] = ()

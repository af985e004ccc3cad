"""GRU cells that an exporter has unrolled: their gates, whether they reset their state before or after its matrix."""

from __future__ import annotations

import numpy as np

from htcompress.graphs.affine import Affine, Affines, NotAffineError, spread
from htcompress.graphs.cores import Core
from htcompress.graphs.left_cells import NoCellError, NotACellError, leaves_of


def gates_of_gru(affines: Affines, core: Core) -> tuple[str, dict[str, int], dict[str, Affine], bool]:
    """The state, the inputs, the gates, and whether the state is reset before the candidate's matrix.

    The gates are z, r, h (of x alone) and b: what r multiplies, or what multiplies the state that r has reset.

    Raises:
        NotACellError: it is no GRU that ONNX has; the text says why.
        NoCellError: it does not look like one.
    """
    values, h = affines.values, core.states[0]
    inner = values.base(core.gates["h"])
    node = values.makers[inner]
    if node.op_type != "Tanh":
        raise NotACellError("has a candidate that is cut out of others")
    plain, reset = _terms(affines, node.input[0])
    z = affines(core.gates["z"])
    if reset is None:
        r, a, b = _reset_before(affines, node.input[0], h)
    else:
        r, b = affines(reset[0]), affines(reset[1])
        a = Affine({}, np.zeros(b.own, np.float32))
        for name in plain:
            value = values.constants(name)
            a = a.plus(affines(name) if value is None else Affine({}, spread(value, b.own)))
    if b.activation:
        raise NotACellError("resets what comes from an activation")
    leaves = leaves_of([z, r])
    x = {leaf: width for leaf, width in leaves.items() if leaf != h}
    if list(b.parts) != [h] or h not in leaves or set(a.parts) != set(x):
        raise NotACellError("reads its state elsewhere than a GRU does")
    z = z.each(np.negative) if core.turned else z
    return h, x, {"z": z, "r": r, "h": a, "b": b}, reset is None


def _reset_before(affines: Affines, candidate: str, h: str) -> tuple[Affine, Affine, Affine]:
    """The gate r, what the candidate is of x, and what multiplies r * h, as if it were of h."""
    try:
        made = affines(candidate)
    except NotAffineError as error:
        raise NoCellError from error
    resets = [leaf for leaf in made.parts if is_reset(affines, leaf, h)]
    if len(resets) != 1:
        # Many a gate mixes two values; without a reset it is none of a cell.
        raise NoCellError
    given = affines.values.makers[resets[0]].input
    gate = next(name for name in given if affines.activation(name) == "Sigmoid" and affines.values.base(name) != h)
    own = {leaf: matrix for leaf, matrix in made.parts.items() if leaf not in resets}
    state = Affine({h: made.parts[resets[0]]}, np.zeros(made.own, np.float32))
    return affines(gate), Affine(own, made.constant), state


def _terms(affines: Affines, name: str, depth: int = 8) -> tuple[list[str], tuple[str, str] | None]:
    """What a candidate is the sum of: values, and the gate and value whose product is among it."""
    values = affines.values
    base = values.base(name)
    node = values.makers.get(base)
    if node is not None and node.op_type == "Add" and depth:
        parts = [_terms(affines, given, depth - 1) for given in node.input]
        resets = [reset for _, reset in parts if reset is not None]
        if len(resets) == 1:
            return [one for plain, _ in parts for one in plain], resets[0]
    if node is not None and node.op_type == "Mul":
        kinds = [affines.activation(given) for given in node.input]
        if kinds.count("Sigmoid") == 1:
            gate = kinds.index("Sigmoid")
            return [], (node.input[gate], node.input[1 - gate])
    return [name], None


def is_reset(affines: Affines, leaf: str, h: str) -> bool:
    """Whether a value is a gate times the state."""
    node = affines.values.makers.get(leaf)
    if node is None or node.op_type != "Mul":
        return False
    given = [affines.values.base(name) for name in node.input]
    return h in given and any(affines.activation(name) == "Sigmoid" for name in given)

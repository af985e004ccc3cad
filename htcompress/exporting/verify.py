"""An ONNX model held against torch in onnxruntime, before anybody relies on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime
from torch import Tensor

from htcompress.errors import RequestError

TOLERANCE = 1e-5
"""The largest difference, relative to outputs larger than 1."""


def session(model: bytes) -> onnxruntime.InferenceSession:
    """onnxruntime on the CPU, with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def difference(
    runtime: onnxruntime.InferenceSession, inputs: Mapping[str, Tensor], expected: Sequence[Tensor], case: str
) -> float:
    """The largest difference of any output, relative to the larger of 1 and the output's size.

    Raises `RequestError`, naming the case, where it is too large or onnxruntime fails.
    """
    try:
        found = runtime.run(None, {name: value.detach().cpu().numpy() for name, value in inputs.items()})
    except Exception as error:
        raise RequestError(
            f"onnxruntime cannot run the exported model on {case}: {str(error).splitlines()[0]}. Its shapes depend on "
            f"more than batch and time; export the recurrent layers alone, without --task."
        ) from error
    worst = 0.0
    for output, (given, value) in enumerate(zip(found, expected, strict=True)):
        reference = value.detach().cpu().numpy()
        if given.shape != reference.shape:
            raise RequestError(
                f"The exported model gives output {output} the shape {given.shape} on {case}, torch gives "
                f"{reference.shape}. Export the recurrent layers alone, without --task."
            )
        if not reference.size:
            continue
        scale = max(1.0, float(np.abs(reference).max()))
        worst = max(worst, float(np.abs(given.astype(np.float64) - reference.astype(np.float64)).max()) / scale)
    if not worst <= TOLERANCE:
        raise RequestError(
            f"The exported model differs from torch by {worst:.2g} on {case}, more than {TOLERANCE:g}, so it was not "
            f"written. Export the recurrent layers alone, without --task."
        )
    return worst

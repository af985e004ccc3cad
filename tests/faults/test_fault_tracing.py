"""Faults of kind 19: what is traced, exported or compiled."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from fault_models import near
from small import clips, tagger

import htcompress


@pytest.mark.parametrize("layout", ["svd", "split", "paired"])
def test_19_export_trace_compile(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = htcompress.compress(tagger(), budget=400, layout=layout)
    assert result.model is not None
    model, x = result.model, clips()
    wanted = model(x)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("time")}
    program = torch.export.export(model, (x,), dynamic_shapes=({**sizes},), strict=False).module()
    longer = torch.randn(7, 9, 24)
    assert near(program(longer), model(longer))
    # Sizes are tensors while torch traces: no shapes in signatures to be checked.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with torch.no_grad():
        traced = torch.jit.trace(model, (x,))
        assert near(traced(longer), model(longer))
    assert near(torch.compile(model, backend="eager")(x), wanted)

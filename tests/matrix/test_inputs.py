"""Inputs as samples and as a moment against the samples written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from htcompress.errors import ShapeError
from htcompress.matrix.blocks import Block, Blocks
from htcompress.matrix.inputs import Inputs, MomentInputs, SampledInputs, gather

SIZES = (12, 7)
FORMS = {"samples": (9, SampledInputs), "moment": (40, MomentInputs)}


def data(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(count, size, generator=generator) + 0.5 for size in SIZES]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[list[Tensor], Inputs]:
    count, kind = FORMS[request.param]
    kinds = data(count)
    inputs = gather(kinds)
    assert isinstance(inputs, kind)
    return kinds, inputs


CHOICES = [
    {"kinds": (0,), "constants": 0, "centred": False},
    {"kinds": (1,), "constants": 0, "centred": True},
    {"kinds": (0, 1), "constants": 0, "centred": True},
    {"kinds": (0, 1), "constants": 1, "centred": False},
    {"kinds": (0, 1), "constants": 2, "centred": False},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_answer_is_that_of_the_samples(form: tuple[list[Tensor], Inputs], choice: dict[str, object]) -> None:
    kinds, inputs = form
    where, constants, centred = choice["kinds"], choice["constants"], choice["centred"]
    assert isinstance(where, tuple)
    assert isinstance(constants, int)
    count = len(kinds[0])
    x = torch.cat([*(kinds[k] for k in where), torch.ones(count, constants)], dim=1).double()
    mean = x.mean(0)
    if centred:
        x = x - mean
    found = inputs.select(*where, constants=constants, centred=bool(centred))
    assert (found.cols, found.count, found.centred) == (x.shape[1], count, centred)

    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(x.shape[1], 3, generator=generator, dtype=torch.float64)
    w = torch.randn(5, x.shape[1], generator=generator, dtype=torch.float64)
    sizes = [kinds[k].shape[1] for k in where] + [constants] * (constants > 0)
    matrix = Blocks([Block(part) for part in w.split(sizes, dim=1)])
    moment = x.T @ x
    close(found.mean, mean)
    close(torch.tensor(found.trace), moment.trace())
    close(torch.tensor(found.square), moment.square().sum())
    close(found.through(factor), moment @ factor)
    close(found.output_gram(matrix), w @ moment @ w.T)
    outputs = found.outputs(matrix)
    close(outputs @ outputs.T, w @ moment @ w.T)
    chunks = ((slice(k, min(k + 4, w.shape[1])), w[:, k : k + 4]) for k in range(0, w.shape[1], 4))
    close(torch.tensor(found.squared(chunks)), (w @ x.T).square().sum())

    # Padded: slabs that end between two vectors of a mode or within one, and less than one slab.
    for before, mode, after in ((2, 3, 4), (1, 4, 7), (4, 3, 3), (1, 3, 30), (1, 30, 1)):
        if x.shape[1] <= before * mode * after:
            missing = before * mode * after - x.shape[1]
            folded = torch.nn.functional.pad(x, (0, missing)).reshape(-1, before, mode, after)
            close(found.mode_moment(before, mode, after), torch.einsum("naib,najb->ij", folded, folded))


def test_kinds_need_equally_many_samples() -> None:
    with pytest.raises(ShapeError, match="as many samples"):
        gather([torch.zeros(3, 2), torch.zeros(4, 2)])


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())

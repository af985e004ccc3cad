"""All forms, in one place. A new one is a file of its own and a line of `FORMS`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from htcompress.forms.block_term import BlockTerm
from htcompress.forms.dense import DenseMatrix
from htcompress.forms.dense_search import DenseSearch
from htcompress.forms.form import Form, MatrixSearch, Problem
from htcompress.forms.ht import HTMatrix, stored_shapes
from htcompress.forms.ht_search import HTSearch
from htcompress.forms.low_rank import low_rank_search
from htcompress.forms.network_matrix import NetworkMatrix, network_shapes
from htcompress.forms.network_search import NetworkSearch
from htcompress.forms.structure import Structure
from htcompress.forms.tensor_ring import TensorRing
from htcompress.forms.tensor_train import TensorTrain
from htcompress.matrix.stored import StoredMatrix
from htcompress.vocabulary import Format


def _network_form(kind: type[Structure]) -> Form:
    return Form(
        kind.format.value,
        search=partial(NetworkSearch, kind=kind),
        zeros=partial(NetworkMatrix.zeros_of, kind),
        shapes=partial(network_shapes, kind),
    )


FORMS: tuple[Form, ...] = (
    Form(Format.DENSE.value, search=DenseSearch, zeros=DenseMatrix.zeros),
    Form(Format.HT.value, search=HTSearch, zeros=HTMatrix.zeros, shapes=stored_shapes),
    Form(Format.SVD.value, search=low_rank_search),
    _network_form(TensorTrain),
    _network_form(TensorRing),
    _network_form(BlockTerm),
)

_BY_NAME = {form.name: form for form in FORMS}


def form_named(name: str) -> Form:
    """The form of a name. Raises `KeyError` where there is none."""
    return _BY_NAME[name]


def searched(problem: Problem, name: str) -> MatrixSearch:
    """The candidates for a matrix in a form. Raises `ValueError` where the form is not one to search for."""
    search = form_named(name).search
    if search is None:
        raise ValueError(f"Nothing is searched for in the form {name!r}.")
    return search(problem)


def stored_names() -> list[str]:
    """The forms that files may hold."""
    return [form.name for form in FORMS if form.zeros is not None]


def zeros(config: Mapping[str, Any]) -> StoredMatrix:
    """The zero matrix of a saved structure; the inverse of `StoredMatrix.to_config`.

    Raises `KeyError` where no form has its name.
    """
    make = form_named(config["form"]).zeros
    if make is None:
        raise KeyError(config["form"])
    return make(dict(config))

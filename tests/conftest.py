"""Shape checks are on in the tests; one thread makes them repeatable and polite."""

from __future__ import annotations

import os

from jaxtyping import install_import_hook

hook = install_import_hook("htcompress", "beartype.beartype")
hook.__enter__()

import pytest  # noqa: E402
import torch  # noqa: E402

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

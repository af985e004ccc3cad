"""Random architectures: equal to the model where the budget is beyond need, to what was written always, or refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from architectures import examine
from crossing import some


@pytest.mark.parametrize("seed", some(range(40), *range(4)))
def test_a_random_architecture(seed: int, tmp_path: Path) -> None:
    assert examine(seed, tmp_path / "out")

"""The report that the views are tried on."""

from __future__ import annotations

import pytest
from sample_report import sample_report

from htcompress.report import Report


@pytest.fixture
def report() -> Report:
    return sample_report()

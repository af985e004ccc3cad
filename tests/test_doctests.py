"""The examples in the docstrings print what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from modules import MODULES

# In a process of its own: the shape checks of the tests would hide decorated functions from doctest, and slow them.
PROGRAM = """
import doctest, importlib, json, sys
found = {}
for name in json.loads(sys.argv[1]):
    shown, examples = [], []
    for test in doctest.DocTestFinder().find(importlib.import_module(name)):
        examples += [test.name] * bool(test.examples)
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=shown.append)
    found[name] = [examples, "".join(shown)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """For each module the docstrings with examples, and what went wrong with them."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(MODULES)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return dict(json.loads(ran.stdout))


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(found: dict[str, Any], name: str) -> None:
    _, shown = found[name]
    assert not shown, shown


def test_there_are_examples(found: dict[str, Any]) -> None:
    names = {name for examples, _ in found.values() for name in examples}
    assert {"htcompress", "htcompress.compression.compress", "htcompress.numbers.whole"} <= names

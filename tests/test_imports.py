"""Every module can be imported first, whatever the others import."""

import subprocess
import sys

import pytest
from modules import MODULES

PROGRAM = """
import importlib, sys
import numpy, torch  # once, for all
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.split(".")[0] in ("htcompress", "htcompress_cli")]:
        del sys.modules[loaded]
    importlib.import_module(name)
    print(name)
"""


@pytest.mark.full
def test_every_module_can_be_the_first_to_be_imported() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *MODULES], capture_output=True, text=True, check=False, timeout=300
    )
    assert ran.stdout.split() == MODULES, ran.stderr

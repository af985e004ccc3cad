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


CONVERSION = """
import sys
import torch
import htcompress
torch.set_num_threads(2)
data = [torch.randn(5, 4, 6) for _ in range(2)]
made = htcompress.compress(torch.nn.LSTM(6, 8), calibration=data, budget=300)
assert made.report.totals.parameters_after <= 300
print(*[name for name in ("torch._dynamo", "sympy", "tensorly", "scipy", "matplotlib") if name in sys.modules])
"""


def test_a_conversion_does_without_torch_s_compiler_and_other_libraries_for_tasks_it_has_not() -> None:
    """The compiler alone takes one to two seconds to be imported."""
    ran = subprocess.run([sys.executable, "-c", CONVERSION], capture_output=True, text=True, check=False, timeout=120)
    assert (ran.returncode, ran.stdout.split()) == (0, []), ran.stderr

"""What counts as a number of a model."""

from __future__ import annotations

import torch

from htcompress.report.build import Counted


def test_exponents_of_inputs_are_counted_in_words_and_bytes_of_others_as_they_are() -> None:
    flags = torch.zeros(10, dtype=torch.int8)
    exponents = torch.zeros(9, dtype=torch.int8)
    counted = Counted.of([], {"flags": flags}, {"flags": flags, "rnn.gates.l0.input_exponents": exponents})
    assert (counted.model_before, counted.model_after) == (10, 10 + 3)

"""What is learnt layer by layer is kept where the whole model answers better for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sample_report import sample_report
from small import Listener, tagger
from torch import nn

import htcompress
from htcompress.exporting.assumed import unknown_settings
from htcompress.finetuning.standing import Progress
from htcompress.stages import kept_if_better, snapshot, tell_if_in_vain


@pytest.mark.parametrize("better", [False, True])
def test_the_model_as_it_was_where_its_outputs_are_worse(better: bool) -> None:
    compact = htcompress.compress(tagger(), budget=700).model
    before = snapshot(compact)
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.add_(1.0)
    learnt, listener = snapshot(compact), Listener()
    worth = {True: 0.1 if better else 0.3, False: 0.2}

    def judge(model: nn.Module) -> float:
        return worth[all(torch.equal(value, learnt[name]) for name, value in model.state_dict().items())]

    kept_if_better(compact, before, judge, listener)
    wanted = learnt if better else before
    assert all(torch.equal(value, wanted[name]) for name, value in compact.state_dict().items())
    assert len(listener.messages) == (0 if better else 1)
    assert better or "0.2000 off before, 0.3000 after" in listener.messages[0]


def test_two_rounds_are_in_vain_together() -> None:
    gained = [Progress(0, 9, 1.0, 1.0), Progress(9, 9, 0.5, 0.5)]
    not_gained = [Progress(0, 7, 1.0, 1.0), Progress(7, 7, 2.0, 1.0)]
    for histories, said in (([gained, not_gained], []), ([not_gained, not_gained], ["nothing in 14 steps"])):
        listener = Listener()
        tell_if_in_vain(histories, listener)
        assert len(listener.messages) == len(said)
        assert all(part in told for part, told in zip(said, listener.messages, strict=True))


def test_what_ran_from_its_own_file_has_told_its_layout() -> None:
    report = sample_report()
    report = replace(report, source={**report.source, "sha256": "0" * 64})
    config = {"layers": {"rnn": {}}}
    for request, missing in (({}, ["nonlinearity", "batch_first"]), ({"data": {"file": "x.npz"}}, [])):
        made = replace(report, request={**request, "task": None})
        assert unknown_settings(config, made) == {"rnn": missing}

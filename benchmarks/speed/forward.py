"""Compressed recurrent layers beside dense ones and other libraries' factorised ones: milliseconds a call.

    python benchmarks/speed/forward.py > benchmarks/results/forward.txt

Wide inputs: 57600 -> 256 over 6 time steps, one and sixteen clips, and a training step. Small models: stacks
compressed to 25 and to 10 %, over 160 steps. What a number in a core is plays no part in how long it takes: they are
random.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

from environment import enter

INPUTS, HIDDEN, STEPS = 57600, 256, 6
IN_MODES, OUT_MODES = (8, 20, 20, 18), (4, 4, 4, 4)
Calls = dict[str, Callable[[Any], Any]]


def ours() -> dict[str, Any]:
    """One matrix for all, split, as `convert --budget 8808` finds it; and a paired layout of the inputs' matrix."""
    import torch

    from htcompress.forms.ht import HTMatrix
    from htcompress.matrix import Layout
    from htcompress.nn import HTLSTM, GateMatrices, RecurrentSettings
    from htcompress.tensor import HTTensor
    from htcompress.vocabulary import Kind

    def random(layout: Layout, ranks: list[int]) -> HTMatrix:
        zeros = HTTensor.zeros(layout.tree, layout.shape, ranks)
        return HTMatrix(layout, zeros.map(lambda core: 0.1 * torch.randn_like(core)))

    settings = RecurrentSettings(Kind.LSTM, INPUTS, HIDDEN)
    split = Layout.split((32, 32), (121, 160, 3), rows=4 * HIDDEN, cols=INPUTS + HIDDEN + 1)
    joint = random(split, [10, 10, 14, 10, 12, 20, 3, 14, 1])
    paired = random(Layout.paired((4, 4, 8, 8), IN_MODES), [8, 8, 8, 8, 8, 8, 1])
    small = random(Layout.split((32, 32), (16, 16), rows=4 * HIDDEN, cols=HIDDEN), [8, 8, 10, 8, 8, 10, 1])
    bias = torch.zeros(4 * HIDDEN)
    return {
        "htcompress, split": HTLSTM.from_matrices(settings, [GateMatrices(joint=joint)]),
        "htcompress, paired": HTLSTM.from_matrices(settings, [GateMatrices(ih=paired, hh=small, bias=bias)]),
    }


def dense_calls(module: Any, name: str = "nn.LSTM") -> Calls:
    """A dense module in torch's two settings; the better one is the fair baseline."""
    import torch

    def without(x: Any) -> Any:
        with torch.backends.mkldnn.flags(enabled=False):
            return module(x)

    return {f"{name}, mkldnn off": without, f"{name}, default": module}


def by_torch(module: Any) -> Callable[[Any], Any]:
    """A compressed module without the program of C that runs its steps."""
    from htcompress.nn import program

    built = program.library

    def call(x: Any) -> Any:
        program.library = lambda: None
        try:
            return module(x)
        finally:
            program.library = built

    return call


def peers() -> tuple[dict[str, Any], Calls]:
    """Factorised layers of other libraries: their modules, and how each is called on (time, batch, features)."""
    import tltorch
    import torch
    import torchtt
    from tednet.tnn.bt_tucker import BTTLSTM
    from tednet.tnn.tensor_ring import TRLSTM
    from tednet.tnn.tensor_train import TTLSTM

    # The input matrix by the library, the recurrence by torch, on all steps at once: as fast as it can be used.
    tail = torch.nn.LSTM(4 * HIDDEN, HIDDEN)
    torch.nn.init.eye_(tail.weight_ih_l0)

    def linear(layer: Any, fold: tuple[int, ...]) -> Callable[[Any], Any]:
        return lambda x: tail(layer(x.reshape(-1, *fold)).reshape(*x.shape[:2], 4 * HIDDEN))

    def recurrent(module: Any) -> Callable[[Any], Any]:
        def call(x: Any) -> Any:
            zeros = x.new_zeros(x.shape[1], HIDDEN)
            return module(x, (zeros, zeros))

        return call

    rows = (4 * OUT_MODES[0], *OUT_MODES[1:])
    block = tltorch.FactorizedLinear(IN_MODES, rows, factorization="blocktt", rank=4)
    ttl = torchtt.nn.LinearLayerTT(list(IN_MODES), list(rows), [1, 10, 10, 10, 1])
    # tednet changes the lists that it is given.
    modules = {
        "tensorly-torch BlockTT, rank 4": block,
        "torchtt LinearLayerTT, rank 10": ttl,
        "tednet TR-LSTM, rank 4": TRLSTM(list(IN_MODES), list(OUT_MODES), [4] * 8),
        "tednet TT-LSTM, rank 4": TTLSTM(list(IN_MODES), list(OUT_MODES), [4] * 3),
        "tednet BTT-LSTM, rank 4": BTTLSTM(list(IN_MODES), list(OUT_MODES), [4] * 4, 2),
    }
    calls = {name: recurrent(module) for name, module in modules.items()}
    calls["tensorly-torch BlockTT, rank 4"] = linear(block, (INPUTS,))
    calls["torchtt LinearLayerTT, rank 10"] = linear(ttl, IN_MODES)
    return modules, calls


def show(title: str, seconds: dict[str, float], baseline: str, notes: dict[str, str] | None = None) -> None:
    print(f"\n{title}")
    print(f"{'':36}{'ms':>10}{'of baseline':>13}{'times faster':>14}")
    for name, value in seconds.items():
        share = value / seconds[baseline]
        note = (notes or {}).get(name, "")
        print(f"{name:36}{value * 1e3:10.3f}{share:13.3f}{1 / share:14.1f}  {note}".rstrip(), flush=True)


def wide(rounds: int) -> None:
    import torch
    from timing import medians

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # what the peers say when loaded
        warnings.simplefilter("ignore")
        mine, (modules, theirs) = ours(), peers()
    dense = torch.nn.LSTM(INPUTS, HIDDEN)
    for module in (*mine.values(), *modules.values(), dense):
        module.eval()
    alone = {f"{name}, torch alone": by_torch(module) for name, module in mine.items()}
    calls: Calls = {"x.sum()": lambda x: x.sum(), **mine, **alone, **dense_calls(dense), **theirs}
    notes = {name: f"{module.parameter_count:,} numbers" for name, module in mine.items()}
    notes |= {name: f"{sum(p.numel() for p in module.parameters()):,} numbers" for name, module in modules.items()}
    for batch in (1, 16):
        x = torch.randn(STEPS, batch, INPUTS)
        with torch.no_grad():
            bound = {name: lambda call=call, x=x: call(x) for name, call in calls.items()}
            seconds = medians(bound, rounds)
        title = f"forward {INPUTS} -> {HIDDEN}, {STEPS} steps, batch {batch}"
        show(title, seconds, "nn.LSTM, mkldnn off", notes)
        own = seconds["htcompress, split"]
        print(f"htcompress, split: {own / seconds['x.sum()']:.1f} times x.sum(); ", end="")
        print(f"the best peer takes {min(seconds[name] for name in theirs) / own:.1f} times as long")

    x = torch.randn(STEPS, 16, INPUTS)
    training: dict[str, Callable[[], Any]] = {}
    for name, call in {**mine, **dense_calls(dense)}.items():
        owner = mine.get(name, dense)
        training[name] = lambda call=call, owner=owner: (call(x)[0].square().mean().backward(), owner.zero_grad())
    title = f"training step (forward, backward), {INPUTS} -> {HIDDEN}, {STEPS} steps, batch 16"
    show(title, medians(training, max(3, rounds // 3)), "nn.LSTM, mkldnn off")


def layers(rounds: int) -> None:
    import torch
    from timing import medians
    from torch import nn

    import htcompress

    stacks = {
        "LSTM 40 -> 256, 3 layers": nn.LSTM(40, 256, 3),
        "GRU 256 -> 256, 2 layers": nn.GRU(256, 256, 2),
        "LSTM 64 -> 128, 2 layers, both ways": nn.LSTM(64, 128, 2, bidirectional=True),
    }
    for title, dense in stacks.items():
        dense.eval()
        for ratio, kind in ((4, "auto"), (4, "svd"), (10, "auto"), (10, "svd")):
            small = htcompress.compress(dense, ratio=ratio, layout=kind).model.eval()
            for batch in (1, 32):
                x = torch.randn(160, batch, dense.input_size)
                calls: Calls = {
                    "compressed": small,
                    "compressed, torch alone": by_torch(small),
                    **dense_calls(dense, "dense"),
                }
                with torch.no_grad():
                    seconds = medians({name: lambda c=call, x=x: c(x) for name, call in calls.items()}, rounds)
                best = min(("dense, mkldnn off", "dense, default"), key=lambda name: seconds[name])
                title_here = f"{title}, compressed to {100 // ratio} % (--layout {kind}), 160 steps, batch {batch}"
                show(title_here, seconds, best, {best: "the better setting"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    enter(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} thread(s), medians of {options.rounds} interleaved rounds")
    wide(options.rounds)
    layers(options.rounds)


if __name__ == "__main__":
    main()

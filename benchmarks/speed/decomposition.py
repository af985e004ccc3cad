"""HT-SVD beside other libraries' decompositions: seconds, errors, parameters, memory.

    python benchmarks/speed/decomposition.py > benchmarks/results/decomposition.txt
    python benchmarks/speed/decomposition.py --scaling     # writes docs/images/scaling.svg

The matrix is 1024 x 57600 in float32: 8 Kronecker terms with weights 0.7^k, and noise of 1e-3. Folded by rows
4 x 4 x 8 x 8 and columns 8 x 20 x 20 x 18 it is a tensor 32 x 80 x 160 x 144; tolerance 1e-2, no rank above 10.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import ROOT, enter

ROWS, COLS = (4, 4, 8, 8), (8, 20, 20, 18)
RTOL, MAX_RANK = 1e-2, 10


def kronecker_terms(shape: tuple[int, ...], noise: float, rank: int = 8, seed: int = 0) -> Any:
    """A sum of rank-one tensors with weights 0.7^k, and relative noise."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.zeros(shape)
    for k in range(rank):
        vectors = [torch.randn(n, generator=generator) for n in shape]
        term = vectors[0] / vectors[0].norm()
        for vector in vectors[1:]:
            term = term[..., None] * (vector / vector.norm())
        x += 0.7**k * term
    return x + noise * x.norm() / x.numel() ** 0.5 * torch.randn(shape, generator=generator)


def tensap_form(x: Any, rtol: float, max_rank: int | None) -> Any:
    """tensap's HT-SVD over a balanced tree; a new Truncator each time, as `hsvd` writes into it."""
    import numpy as np
    import tensap

    order = x.ndim
    options = {"tolerance": rtol} | ({"max_rank": max_rank} if max_rank else {})
    tree = tensap.DimensionTree.balanced(order)
    return tensap.Truncator(**options).hsvd(tensap.FullTensor(np.asarray(x)), tree)


def contestants() -> dict[str, Callable[[Any, Any], Any]]:
    """By name, what decomposes (matrix, folded tensor)."""
    import tensorly
    import torchtt
    from tensorly.decomposition import tensor_train

    from htcompress.forms.ht import HTMatrix
    from htcompress.matrix import Layout
    from htcompress.tensor import ht_svd

    layout = Layout.paired(ROWS, COLS)
    return {
        "htcompress, from the matrix": lambda w, x: HTMatrix.from_dense(w, layout, rtol=RTOL, max_rank=MAX_RANK),
        "htcompress, folded": lambda w, x: ht_svd(x, layout.tree, rtol=RTOL, max_rank=MAX_RANK),
        "tensap 1.8, folded": lambda w, x: tensap_form(x.numpy(), RTOL, MAX_RANK),
        "tensorly tensor_train": lambda w, x: tensor_train(tensorly.tensor(x.numpy()), rank=[1, 10, 10, 10, 1]),
        "torchtt TT": lambda w, x: torchtt.TT(x, eps=RTOL, rmax=MAX_RANK),
        "norm (one read)": lambda w, x: x.norm(),
    }


def data() -> tuple[Any, Any]:
    """The matrix, and the tensor it folds into."""
    from htcompress.matrix import Layout

    x = kronecker_terms(tuple(m * n for m, n in zip(ROWS, COLS, strict=True)), 1e-3)
    return Layout.paired(ROWS, COLS).unfold(x).contiguous(), x


def measure(result: Any, x: Any) -> tuple[float, str]:
    """Relative error, and the numbers stored; for ours also with all identities written out, as others count."""
    import numpy as np
    import torch

    from htcompress.forms.ht import HTMatrix
    from htcompress.tensor import HTTensor

    if isinstance(result, HTMatrix):
        result = result.tensor
    if isinstance(result, HTTensor):
        return result.relative_error(x), f"{result.parameters} ({result.expanded().parameters})"
    if isinstance(result, torch.Tensor):  # the norm
        return 0.0, ""
    if hasattr(result, "storage"):
        full, count = torch.from_numpy(np.asarray(result.full().data)), result.storage()
    elif hasattr(result, "factors"):
        full, count = torch.from_numpy(np.asarray(result.to_tensor())), sum(f.size for f in result.factors)
    else:
        full, count = result.full(), sum(core.numel() for core in result.cores)
    return float((full.double() - x.double()).norm() / x.double().norm()), str(int(count))


def table(rounds: int, threads: int) -> None:
    from timing import in_fresh_process, medians

    matrix, x = data()
    calls = contestants()
    found: dict[str, Any] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        runs[name] = lambda name=name, call=call: found.__setitem__(name, call(matrix, x))
    seconds = medians(runs, rounds)
    ours = seconds["htcompress, from the matrix"]
    print(f"1024 x 57600, tolerance {RTOL}, rank <= {MAX_RANK}; {threads} thread(s), medians of {rounds} rounds")
    print(f"{'':30}{'s':>8}{'x ours':>8}{'error':>10}{'numbers':>16}{'memory':>10}{'of it':>7}")
    size = matrix.numel() * 4 / 2**20
    for name in calls:
        error, numbers = measure(found[name], x)
        extra = in_fresh_process(__file__, "--memory", name, "--threads", str(threads))
        print(
            f"{name:30}{seconds[name]:8.3f}{seconds[name] / ours:8.1f}{error:10.2e}{numbers:>16}"
            f"{extra:7.0f} MB{extra / size:7.2f}",
            flush=True,
        )
    print("numbers in brackets: with the identities written out that htcompress does not store")


def fine_tolerance() -> None:
    """Low rank and noise of 1e-6 at tolerance 1e-5: float32 Gram matrices would see noise of full rank."""
    from htcompress.tensor import DimensionTree, ht_svd

    x = kronecker_terms((32, 40, 40, 36), 1e-6)
    ours = ht_svd(x, DimensionTree.balanced(4), rtol=1e-5)
    theirs = tensap_form(x.double().numpy(), 1e-5, None)
    counts = ours.expanded().parameters, int(theirs.storage())
    print("\n32 x 40 x 40 x 36 of rank 8 with noise of 1e-6, tolerance 1e-5")
    print(f"htcompress from float32: {counts[0]} numbers, error {ours.relative_error(x):.2e}")
    error, _ = measure(theirs, x)
    print(f"tensap from float64: {counts[1]} numbers, error {error:.2e}; ratio {counts[0] / counts[1]:.3f}")


def scaling(rounds: int, threads: int) -> None:
    """Time against size, from one to sixty million numbers; paired layouts of four leaves."""
    from timing import medians

    from htcompress.forms.ht import HTMatrix
    from htcompress.matrix import Layout

    sizes, times = [], []
    for cols in ((8, 8, 4, 4), (8, 10, 8, 6), (8, 10, 16, 6), (8, 20, 16, 9), (8, 20, 20, 9), (8, 20, 20, 18)):
        layout = Layout.paired(ROWS, cols)
        x = kronecker_terms(layout.shape, 1e-3)
        matrix = layout.unfold(x).contiguous()
        call = lambda m=matrix, f=layout: HTMatrix.from_dense(m, f, rtol=RTOL, max_rank=MAX_RANK)  # noqa: E731
        seconds = medians({"ours": call}, rounds)["ours"]
        sizes.append(matrix.numel() / 1e6)
        times.append(seconds)
        print(f"{sizes[-1]:8.2f} million numbers {seconds * 1e3:9.1f} ms {seconds * 1e3 / sizes[-1]:7.2f} ms/million")
    plot(sizes, times, threads)


def plot(sizes: list[float], times: list[float], threads: int) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "htcompress"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.loglog(sizes, times, "o-", label="HTMatrix.from_dense")
    axes.loglog(sizes, [times[-1] / sizes[-1] * size for size in sizes], "--", color="gray", label="linear")
    axes.set_xlabel("million numbers in the matrix")
    axes.set_ylabel(f"seconds, {threads} thread(s)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = ROOT / "docs" / "images" / "scaling.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--memory", metavar="NAME", help="print the extra peak memory of one contestant, in MB")
    options = parser.parse_args()
    enter(options.threads)
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    torch.set_num_threads(options.threads)
    if options.memory:
        from timing import peak_above

        call = contestants()[options.memory]
        matrix, x = data()
        print(json.dumps(peak_above(lambda: call(matrix, x))))
    elif options.scaling:
        scaling(options.rounds, options.threads)
    else:
        table(options.rounds, options.threads)
        fine_tolerance()


if __name__ == "__main__":
    main()
